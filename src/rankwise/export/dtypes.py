"""The dtypes that adapters are written in."""

from __future__ import annotations

import torch

from rankwise.checks import require_choice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chosen_dtype(name: str | None, otherwise: torch.dtype) -> torch.dtype:
    """The dtype by its name; `otherwise` where none is chosen.

    Raises:
        ArgumentError: there is none of this name to write in.
    """
    if name is None:
        return otherwise
    require_choice("dtype", name, tuple(DTYPES))
    return DTYPES[name]
