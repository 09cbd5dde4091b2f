"""vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rankwise.export.servers import rules
from rankwise.export.servers.base import Server, rule

if TYPE_CHECKING:
    from rankwise.export.reader import AdapterFiles

RANK_LIMITS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that max_lora_rank may have."""
HEADS = ("classifier", "score")
"""The modules trained in full that vLLM loads."""


@rule("modules trained in full")
def modules_trained_in_full_but_heads(files: AdapterFiles) -> Iterator[str]:
    """vLLM replaces the head of a classifier, and no other module."""
    for name in files.config.get("modules_to_save") or ():
        if name not in HEADS:
            yield f"modules_to_save names {name!r}; vLLM takes {' and '.join(HEADS)} only"


@rule("rank limit")
def rank_above_every_limit(files: AdapterFiles) -> Iterator[str]:
    """max_lora_rank comes from a fixed list."""
    if files.largest_rank > RANK_LIMITS[-1]:
        yield f"rank {files.largest_rank} is above {RANK_LIMITS[-1]}, the most vLLM can be started with"


@rule("class of the base model")
def names_of_another_class(files: AdapterFiles) -> Iterator[str]:
    """vLLM opens the class that the base model's config names, whatever class the adapter was trained on.

    Text-only adapters of multimodal models name modules of the language model alone, and match none of its modules.
    """
    if files.base is None or files.base.class_in_config is None:
        return
    unmatched = [name for name in files.modules if name not in files.base.modules_in_config]
    if not unmatched:
        return
    consequence = "serve the bare base model" if len(unmatched) == len(files.modules) else "leave its update out"
    yield (
        f"vLLM opens the base model as {files.base.class_in_config}, which its config names and which has no module "
        f"{unmatched[0]!r}: it would {consequence}"
    )


class VLLM(Server):
    """Loads PEFT's folders, with a rank limit from a fixed list."""

    name = "vllm"
    title = "vLLM"
    start_command = "vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}"
    rules = (
        *rules.OF_PLAIN_UPDATES,
        rules.foreign_tensors,
        modules_trained_in_full_but_heads,
        rank_above_every_limit,
        names_of_another_class,
    )
    has_rank_limit = True
    rank_limits = RANK_LIMITS
