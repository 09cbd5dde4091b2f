"""llama.cpp, by way of its converter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rankwise.export.servers import rules
from rankwise.export.servers.base import Server, rule

if TYPE_CHECKING:
    from rankwise.export.reader import AdapterFiles


@rule("base model named")
def no_base_model_named(files: AdapterFiles) -> Iterator[str]:
    """The converter takes sizes and names from the base model."""
    if not files.config.get("base_model_name_or_path"):
        yield "base_model_name_or_path is not set, and the converter asks for it (or for --base)"


class LlamaCpp(Server):
    """Converts PEFT's folders, and scales each update by lora_alpha over the rank of its tensors."""

    name = "llama.cpp"
    title = "llama.cpp"
    start_command = "python convert_lora_to_gguf.py {folder}"
    rules = (
        *rules.OF_PLAIN_UPDATES,
        rules.foreign_tensors,
        no_base_model_named,
        rules.modules_trained_in_full,
        rules.rslora_scale,
        rules.alpha_per_module,
    )
