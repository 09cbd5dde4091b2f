"""diffusers, whose pipelines load one file under names of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.export.servers import rules
from rankwise.export.servers.base import Server, rule

if TYPE_CHECKING:
    from rankwise.export.shipped import Shipped


@rule("diffusers' names")
def folder_of_peft(files: Shipped) -> Iterator[str]:
    """diffusers knows modules by the component they belong to."""
    if not files.is_diffusers:
        yield "a PEFT folder would be loaded without effect: its keys must begin with unet. or transformer."


@rule("diffusers' scale")
def scale_without_metadata(files: Shipped) -> Iterator[str]:
    """diffusers takes alphas from the header, or else each equal to its rank."""
    if not files.is_diffusers or files.has_metadata:
        return
    for name in files.whole:
        if files.scale(name) != 1:
            yield f"{name!r} has scale {files.scale(name):g}, and without lora_adapter_metadata 1 is taken"
            return


class Diffusers(Server):
    """Loads a file of its own, with the config in the file's header."""

    name = "diffusers"
    title = "diffusers"
    start_command = 'pipeline.load_lora_weights("{folder}")'
    rules = (
        *rules.OF_EVERY_SERVER,
        rules.modules_trained_in_full,
        rules.foreign_tensors,
        folder_of_peft,
        scale_without_metadata,
    )
    loads_peft_folders = False
    written_for = "renames keys, puts the config into the file's header"
    library = "diffusers"
    load_code = start_command

    def rewrite(self, folder: Path, base_class: str) -> None:
        """Rename the keys, and put the config into the file's header."""
        # Imported here, since the command line's help lists the servers and must not wait for torch.
        from rankwise.export.shipped import rename_for_diffusers

        rename_for_diffusers(folder, base_class)
