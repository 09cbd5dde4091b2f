"""The names of tensors in an adapter's file: what each says, whatever training loop has put into it.

PEFT writes `base_model.model.MODULE.lora_A.weight`. Wrappers (torch.compile, FSDP, DDP) put names of their own between
the parts, older or hand-made files have the adapter's name behind `lora_A`, and some lack the prefix.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PEFT_PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.*)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?:\.(?P<rest>.*))?", re.DOTALL)
"""A key of A or B; `rest` is `weight`, an adapter's name, or the name and `weight`."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""Modules that torch.compile, FSDP, activation checkpointing and DDP put around others, and into their names."""


class Key(NamedTuple):
    """What the name of a tensor in an adapter's file says."""

    module: str
    """The module's name in the base model; of a tensor that is neither A nor B, the tensor's own name."""
    part: str = ""
    """ "A", "B" or "alpha"; "" for any other tensor."""
    prefix: str = ""
    """What stood before the name in the base model."""
    embedding: bool = False
    """Whether A or B is an embedding's."""
    adapter: str = ""
    """The adapter's name, where the key holds one."""
    wrappers: tuple[str, ...] = ()
    """Wrappers whose names were left out."""


def parsed_key(key: str) -> Key:
    """What a tensor's name says, PEFT's prefix, wrappers and an adapter's name left out."""
    path, wrappers = _unwrapped(key)
    prefix = PEFT_PREFIX if path.startswith(PEFT_PREFIX) else ""
    name = path.removeprefix(prefix)
    if name.endswith(".alpha"):
        return Key(name.removesuffix(".alpha"), "alpha", prefix, wrappers=wrappers)
    found = FACTOR.fullmatch(name)
    if found is None:
        return Key(name, "", prefix, wrappers=wrappers)
    embedding = found["embedding"] is not None
    adapter = _adapter_name(found["rest"], embedding)
    if adapter is None:
        return Key(name, "", prefix, wrappers=wrappers)
    return Key(found["module"], found["part"], prefix, embedding, adapter, wrappers)


def clean_key(key: str) -> str:
    """A tensor's name as PEFT writes it."""
    told = parsed_key(key)
    if told.part in ("A", "B"):
        ending = f"lora_embedding_{told.part}" if told.embedding else f"lora_{told.part}.weight"
        return f"{PEFT_PREFIX}{told.module}.{ending}"
    return f"{PEFT_PREFIX}{told.module}{'.alpha' if told.part else ''}"


def _unwrapped(key: str) -> tuple[str, tuple[str, ...]]:
    """A key without the wrappers in its path, and which there were.

    `module` is also a name that a model may give a part of its own; it is taken for a wrapper only where DDP puts it:
    around the whole adapted model, or around the whole base model.
    """
    parts = key.split(".")
    before = PEFT_PREFIX.rstrip(".").split(".")
    kept: list[str] = []
    left_out: list[str] = []
    for part in parts:
        around_a_model = kept in ([], before)
        if part in WRAPPERS and (part != "module" or around_a_model):
            left_out.append(part)
        else:
            kept.append(part)
    return ".".join(kept), tuple(left_out)


def _adapter_name(rest: str | None, embedding: bool) -> str | None:
    """The adapter's name behind `lora_A`, "" where there is none; None where this is no key of A or B."""
    if embedding:
        name = rest or ""
    elif rest == "weight":
        name = ""
    elif rest is not None and rest.endswith(".weight"):
        name = rest.removesuffix(".weight")
    else:
        return None
    return None if "." in name else name
