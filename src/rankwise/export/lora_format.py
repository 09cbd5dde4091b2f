"""How the update of a module lies in a LoRA file of PEFT's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.update import Factors

LINEAR, CONVOLUTION, EMBEDDING = "linear layer", "convolution", "embedding"
"""The kinds of modules that a LoRA adapts."""


class LoraFormat(NamedTuple):
    """How the update of a module of the base model lies in a LoRA file of PEFT's."""

    kind: str
    """LINEAR, CONVOLUTION or EMBEDDING."""
    shape: tuple[int, int]
    """(out, in) of its matrix; a convolution's `in` is that of its flattened kernel."""
    transposed: bool = False
    """Whether it is a Conv1D of transformers, whose weight is (in, out)."""
    kernel: tuple[int, ...] = ()
    """(in, …) of a convolution's kernel, as A has it."""
    padding: int | None = None
    """The id without an update of an embedding."""
    unlike: str | None = None
    """Why PEFT's LoRA of this module would compute something else."""

    @property
    def names(self) -> tuple[str, str]:
        """What PEFT calls A and B of such a module."""
        if self.kind == EMBEDDING:
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A.weight", "lora_B.weight"

    def written(self, f: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
        """An update as PEFT's tensors, every scale in B."""
        A, B = f.A.float().to(dtype), (f.B * f.s).float().to(dtype)
        if self.kernel:
            # PEFT has a convolution with the module's kernel for A, and one with a kernel of size 1 for B.
            size_one = (1,) * (len(self.kernel) - 1)
            A, B = A.unflatten(1, self.kernel), B.reshape(*B.shape, *size_one)
        return dict(zip(self.names, (A, B), strict=True))


def format_of_tensors(A: Tensor, B: Tensor, *, embedding: bool, transposed: bool) -> LoraFormat:
    """The format of a module as its tensors tell it, without the base model.

    Args:
        A: as it lies in the file.
        B: as it lies in the file.
        embedding: whether their names are those of an embedding's.
        transposed: whether the adapter's config says that weights are (in, out).
    """
    shape = (B.shape[0], math.prod(A.shape[1:]))
    if embedding:
        return LoraFormat(EMBEDDING, shape)
    if A.dim() > 2:
        return LoraFormat(CONVOLUTION, shape, kernel=tuple(A.shape[1:]))
    return LoraFormat(LINEAR, shape, transposed)
