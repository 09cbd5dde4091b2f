"""The tensors of one adapter on one layer: parameters, buffers, counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.progress import LENGTH
from rankwise.methods.base import Method, Size


class AdapterTensors(nn.Module):
    """What a method's `slots` declare for one layer, under their own names.

    Trained slots are parameters; the others persistent buffers (PEFT's `set_adapter` turns gradients on for every
    parameter, so what must not train cannot be one). `exact` slots stay float32 through every cast of the model, unless
    the adapter was made with `autocast_adapter_dtype=False`.
    """

    progress: Tensor

    def __init__(self, method: Method, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.slots = method.slots(size)
        self.awaits_start = False
        self.edits = 0  # of its values by loads, casts and starts: everything but training
        self.loose_dtype, self.exact_dtype = dtype, torch.float32
        for name, slot in self.slots.items():
            kept_exact = slot.exact or not slot.dtype.is_floating_point
            value = torch.zeros(slot.shape, dtype=slot.dtype if kept_exact else dtype, device=device)
            if slot.trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self.register_buffer("progress", torch.zeros(LENGTH, dtype=torch.int64, device=device))

    def named(self) -> dict[str, Tensor]:
        """The method's tensors by name."""
        return {name: getattr(self, name) for name in self.slots}

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy `values` in; tensors not named keep theirs."""
        self.edits += 1
        for name, value in values.items():
            getattr(self, name).copy_(value)

    def restore_exact(self) -> None:
        """Put exact tensors that a trainer cast by hand back to float32."""
        for name, slot in self.slots.items():
            tensor, dtype = getattr(self, name), self.exact_dtype if slot.trained else torch.float32
            if slot.exact and tensor.dtype != dtype:
                tensor.data = tensor.data.to(dtype)
                self.edits += 1

    def follow_base_dtype(self) -> None:
        """Hold exact parameters, too, in the base layer's dtype: what `autocast_adapter_dtype=False` asks for."""
        self.exact_dtype = self.loose_dtype
        self.restore_exact()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterTensors:
        """Move as any module does, but do not let a cast round what is exact."""
        self.edits += 1
        exact = {name: getattr(self, name).data for name, slot in self.slots.items() if slot.exact}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            now = getattr(self, name)
            if now.dtype != before.dtype:
                now.data = before.to(now.device) if now.device.type != "meta" else now.data.to(before.dtype)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loaded tensors need no start: an SVD is never recomputed for a saved adapter."""
        if any(key.startswith(prefix) for key in state_dict):
            self.awaits_start = False
            self.edits += 1
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Names and shapes, as `print(model)` shows them."""
        return ", ".join(f"{name}{slot.shape}" for name, slot in self.slots.items() if slot.trained)
