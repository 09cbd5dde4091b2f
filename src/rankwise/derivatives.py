"""Where derivatives written by hand may stand in for autograd's."""

from __future__ import annotations

import torch


def by_hand() -> bool:
    """Not in a graph that is being compiled, or transformed by torch.func: these see through plain operations only."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
