"""diffusers, whose pipelines load one file under names of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.export.servers import rules
from rankwise.export.servers.base import Server, rule

if TYPE_CHECKING:
    from rankwise.export.pipeline_files import PipelineFiles
    from rankwise.export.reader import AdapterFiles

UNDERSTOOD = (".lora_magnitude_vector", ".lora_B.bias")
"""In keys of DoRA's magnitudes and of biases, from which diffusers tells what they are."""


def pipeline(files: AdapterFiles) -> Iterator[PipelineFiles]:
    """The files, if they are those of a pipeline's LoRA: of PEFT's folder, the first rule says all there is to say."""
    if files.is_of_pipeline:
        yield files  # type: ignore[misc]  what is of diffusers' form is read as such


@rule("diffusers' names")
def folder_of_peft(files: AdapterFiles) -> Iterator[str]:
    """diffusers knows modules by the component they belong to."""
    if not files.is_of_pipeline:
        yield "a PEFT folder would be loaded without effect: its keys must begin with unet. or transformer."


@rule("prefix")
def no_component(files: AdapterFiles) -> Iterator[str]:
    """Each component takes the keys that begin with its name, and others go to none."""
    for found in pipeline(files):
        if found.without_prefix:
            key = next(iter(found.keys[found.without_prefix[0]].values()))
            yield f"{key!r} begins with no component's name, as unet. or text_encoder., so it would match nothing"


@rule("converted names")
def unconverted_names(files: AdapterFiles) -> Iterator[str]:
    """diffusers converts the names that kohya's scripts and ComfyUI give."""
    from rankwise.export.known_pipeline import unconverted_by_diffusers

    for found in pipeline(files):
        if found.spelling != "diffusers":
            reason = unconverted_by_diffusers(found)
            if reason is not None:
                yield f"it has {found.spelling}'s names, and {reason}"


@rule("blocks by two numberings")
def blocks_by_two_numberings(files: AdapterFiles) -> Iterator[str]:
    """Of the two ways in which kohya's scripts number a UNet's blocks, diffusers takes one, its own, where both are."""
    from rankwise.export.pipeline_files import numberings_of

    for found in pipeline(files):
        if len(numberings_of(found.modules)) > 1:
            yield "a UNet's blocks have Stability AI's numbers and diffusers' own; it would leave out the former"


@rule("component without a config")
def component_without_config(files: AdapterFiles) -> Iterator[str]:
    """Where the header holds configs, diffusers takes a component's from it alone."""
    for found in pipeline(files):
        components = dict.fromkeys(name.partition(".")[0] for name in found.modules)
        for component in components if found.headers and found.spelling == "diffusers" else ():
            if component not in found.headers:
                yield f"the file's header holds configs, and none of {component}"


@rule("type")
def another_kind_of_adapter(files: AdapterFiles) -> Iterator[str]:
    """diffusers reads each config as a LoRA's."""
    for component, config in headers(files):
        if config.get("peft_type", "LORA") != "LORA":
            yield f"the peft_type of {component} is {config['peft_type']!r}: it would be read as a plain LoRA"


@rule("rank of the config")
def another_rank_than_the_headers(files: AdapterFiles) -> Iterator[str]:
    """diffusers makes its layers by the header's ranks, and loads no others."""
    for found in pipeline(files):
        for name, parts in found.whole.items():
            ranks = {parts["A"].shape[0], parts["B"].shape[1]}
            if ranks != {found.rank(name)}:
                yield f"{name!r} should have rank {found.rank(name)}; its tensors have {sorted(ranks)}"


@rule("modules trained in full")
def modules_trained_in_full(files: AdapterFiles) -> Iterator[str]:
    """diffusers loads updates, and no modules in their place."""
    for component, config in headers(files):
        if config.get("modules_to_save"):
            yield f"modules_to_save of {component} names {config['modules_to_save']}, which it does not load"


@rule("stray alpha")
def alpha_among_its_own_names(files: AdapterFiles) -> Iterator[str]:
    """Among names of its own, diffusers refuses every key without "lora" in it; kohya's it converts."""
    for found in pipeline(files):
        for name in found.alphas if found.spelling == "diffusers" else ():
            yield f"{name + '.alpha'!r} is a scale beside the tensors, which it refuses among names of its own"


@rule("scales told twice")
def scales_told_twice(files: AdapterFiles) -> Iterator[str]:
    """diffusers takes scales from the header or from alphas."""
    for found in pipeline(files):
        if found.headers and found.alphas and found.spelling != "diffusers":
            yield "the header holds configs and the file holds alphas, which it refuses together"


@rule("alphas of attention")
def alphas_of_attention(files: AdapterFiles) -> Iterator[str]:
    """diffusers 0.42 loses the alphas of kohya's layers of attention, and gives them their component's usual one."""
    for found in pipeline(files):
        if found.spelling != "kohya":
            continue
        for start in found.kohya_components():
            alphas = {name: alpha for name, alpha in found.alphas.items() if name.startswith(start)}
            usual = Counter(alphas.values()).most_common(1)
            for name, alpha in alphas.items():
                if "attn" in name and alpha != usual[0][0]:
                    yield f"{name!r} has alpha {alpha:g} and would get {usual[0][0]:g}, the most frequent of {start}*"
                    break


@rule("foreign tensors")
def foreign_tensors(files: AdapterFiles) -> Iterator[str]:
    """diffusers refuses or leaves out what is no part of a LoRA."""
    for found in pipeline(files):
        for key in found.others:
            if not any(part in key for part in UNDERSTOOD):
                yield f"{key!r} is no tensor of a LoRA adapter"


def headers(files: AdapterFiles) -> Iterator[tuple[str, dict[str, Any]]]:
    """The components of a pipeline's file and their configs in its header."""
    for found in pipeline(files):
        yield from found.headers.items()


class Diffusers(Server):
    """Loads a file of its own, with the config of each component in the file's header."""

    name = "diffusers"
    title = "diffusers"
    start_command = 'pipeline.load_lora_weights("{folder}")'
    rules = (
        folder_of_peft,
        rules.no_tensors,
        another_kind_of_adapter,
        rules.half_an_update,
        rules.rank_zero,
        rules.no_matrix,
        another_rank_than_the_headers,
        rules.not_finite,
        rules.no_real_numbers,
        no_component,
        rules.odd_names,
        rules.unknown_module,
        rules.another_width,
        unconverted_names,
        blocks_by_two_numberings,
        component_without_config,
        alpha_among_its_own_names,
        scales_told_twice,
        alphas_of_attention,
        modules_trained_in_full,
        foreign_tensors,
    )
    loads_peft_folders = False
    written_for = "renames keys, puts the config into the file's header"
    hub_tag = "diffusers"
    load_code = start_command

    def rewrite(self, folder: Path, base_class: str) -> None:
        """Rename the keys, and put the config into the file's header."""
        # Imported here, since the command line's help lists the servers and must not wait for torch.
        from rankwise.export.pipeline_lora import rename_for_diffusers

        rename_for_diffusers(folder, base_class)
