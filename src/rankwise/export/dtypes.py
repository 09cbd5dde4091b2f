"""The dtypes that adapters are written in."""

from __future__ import annotations

import torch

from rankwise.checks import require_choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(name: str | None) -> None:
    """Raise `ArgumentError` for a name that is given and none of `DTYPES`."""
    if name is not None:
        require_choice("dtype", name, tuple(DTYPES))


def chosen_dtype(name: str | None, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of this name; `otherwise` where none is chosen."""
    return otherwise if name is None else DTYPES[name]
