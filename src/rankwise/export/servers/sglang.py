"""SGLang."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rankwise.export.servers import rules
from rankwise.export.servers.base import Server, rule

if TYPE_CHECKING:
    from rankwise.export.reader import AdapterFiles

LAYER = re.compile(r"layers\.(\d+)\.")
"""Where it reads the number of a layer from (`get_layer_id`)."""


def missing_beside(names: set[str]) -> list[str]:
    """The modules that SGLang keeps in one buffer with `names` of one parent and wants beside them.

    It wants q_proj with k_proj or v_proj, v_proj with q_proj or k_proj, and gate_proj with up_proj.
    """
    missing = []
    if names & {"k_proj", "v_proj"} and "q_proj" not in names:
        missing.append("q_proj")
    if names & {"q_proj", "k_proj"} and "v_proj" not in names:
        missing.append("v_proj")
    if "up_proj" in names and "gate_proj" not in names:
        missing.append("gate_proj")
    return missing


@rule("rank per module")
def rank_per_module(files: AdapterFiles) -> Iterator[str]:
    """Its buffers have one rank."""
    if files.config.get("rank_pattern"):
        yield "rank_pattern is set, and it reads r alone: export the uniform layout"


@rule("added tokens")
def added_tokens(files: AdapterFiles) -> Iterator[str]:
    """Adapters that bring tokens of their own are refused."""
    if (files.folder / "added_tokens.json").exists():
        yield "added_tokens.json lies beside it, and adapters with tokens of their own are refused"


@rule("regular expression")
def regular_expression(files: AdapterFiles) -> Iterator[str]:
    """It compares target_modules with names."""
    targets = files.config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        yield f"target_modules is the expression {targets!r}; it takes a list of names"


@rule("foreign tensors")
def foreign_tensors_but_embeddings(files: AdapterFiles) -> Iterator[str]:
    """SGLang passes embeddings by that PEFT has saved unchanged, unless the adapter targets them."""
    for key in rules.foreign_keys(files):
        name = key.removesuffix(".weight")
        if not rules.is_saved_embedding(key):
            yield f"{key!r} is no tensor of a LoRA adapter"
        elif files.is_target(name):
            yield f"{key!r} is a weight of the base model, which it would read as an update of {name!r}"


@rule("modules kept together")
def part_of_a_buffer(files: AdapterFiles) -> Iterator[str]:
    """A buffer needs all its parts."""
    for parent, names in files.siblings().items():
        for name in missing_beside(names):
            yield f"{parent!r} adapts {', '.join(sorted(names))} and not {name}, which it keeps in one buffer with them"


@rule("one place for two modules")
def two_modules_of_one_place(files: AdapterFiles) -> Iterator[str]:
    """It finds a module by the number of its layer and its own name, whatever model inside the base that is of."""
    first_of_place: dict[tuple[str, str], str] = {}
    for name in files.modules:
        layer = LAYER.search(name)
        if layer is None or ".experts." in name:
            continue
        first = first_of_place.setdefault((layer[1], name.rpartition(".")[2]), name)
        if first != name:
            yield f"{first!r} and {name!r} are of one number and one name, and it would take one update for both"


class SGLang(Server):
    """Loads PEFT's folders at one rank, and keeps q, k and v, or gate and up, in one buffer."""

    name = "sglang"
    title = "SGLang"
    start_command = "python -m sglang.launch_server --model-path BASE --max-lora-rank {rank} --lora-paths NAME={folder}"
    rules = (
        *rules.OF_PLAIN_UPDATES,
        foreign_tensors_but_embeddings,
        rules.modules_trained_in_full,
        rules.rslora_scale,
        rules.alpha_per_module,
        rank_per_module,
        added_tokens,
        regular_expression,
        part_of_a_buffer,
        two_modules_of_one_place,
    )
    has_rank_limit = True
    layouts = ("uniform",)
    written_for = "adds zero factors for q, v or gate where it needs them"

    def modules_wanted_beside(self, names: set[str]) -> list[str]:
        """The rest of each buffer."""
        return missing_beside(names)
