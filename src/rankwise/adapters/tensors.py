"""The tensors of one adapter on one layer: parameters, buffers, counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.peers import share
from rankwise.adapters.probe import FoundStarts
from rankwise.adapters.progress import LENGTH
from rankwise.errors import AdapterFileError
from rankwise.methods.base import Method, Size
from rankwise.methods.stack import CLOSED
from rankwise.shards import whole, write

PEAKS = "peaks"
ADDED_IN_FORMAT_2 = (CLOSED, PEAKS, "seed")
"""Tensors that a file of format 1 does not hold. Zeros stand for them: no rank is closed, no rate was seen, and random
numbers are drawn from seed 0."""


class AdapterTensors(nn.Module):
    """What a method's `slots` declare for one layer, under their own names.

    Trained slots are parameters; the others persistent buffers (PEFT's `set_adapter` turns gradients on for every
    parameter, so what must not train cannot be one). All are made in float32. `exact` slots stay so through every cast
    of the model, unless the adapter was made with `autocast_adapter_dtype=False`; a buffer that is the start of a
    parameter is rounded whenever its parameter has been, so that the two still cancel.
    """

    progress: Tensor
    """The counters of `progress.Progress`."""
    peaks: Tensor
    """For each parameter, the highest learning rate that no schedule had declared; 0 where there was none."""

    def __init__(self, method: Method, size: Size, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.slots = method.slots(size)
        self.awaits_start = False
        self.unchecked = False  # loaded, and not yet known to be finite
        self.awaits_gradient = False  # some tensors are 0 until a gradient of the base weight gives them their start
        self.saw_gradient = False  # a backward pass has shown one, if only zeros
        self.starts = FoundStarts()
        self._observed: tuple[nn.Parameter, Any] | None = None  # a parameter and its hook, while a start is awaited
        self.folded: tuple[int, Tensor] | None = None  # (edits, the base weight with a frozen part of the update)
        self._prefix: tuple[Tensor, int, int] | None = None  # a mask, its version, how many ranks hold all that is open
        self.edits = 0  # of its values by loads, casts and starts: everything but training
        self.exact_dtype = torch.float32
        for name, slot in self.slots.items():
            value = torch.zeros(slot.shape, dtype=slot.dtype, device=device)
            if slot.trained:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        self._exact = tuple(name for name, slot in self.slots.items() if slot.exact)
        self.register_buffer("progress", torch.zeros(LENGTH, dtype=torch.int64, device=device))
        self.register_buffer(PEAKS, torch.zeros(len(self._parameters), dtype=torch.float32, device=device))

    def named(self) -> dict[str, Tensor]:
        """The method's tensors by name."""
        own = self._parameters | self._buffers  # not by getattr: every forward pass of every layer comes through here
        return {name: own[name] if name in own else getattr(self, name) for name in self.slots}  # type: ignore[misc]

    def gathered(self) -> dict[str, Tensor]:
        """The method's tensors by name, whole."""
        return {name: whole(tensor) for name, tensor in self.named().items()}

    def trained(self) -> list[nn.Parameter]:
        """The parameters; torch's own `parameters()` searches modules, which steps of small models would feel."""
        return list(self._parameters.values())  # type: ignore[arg-type]

    def open_prefix(self, mask: Tensor) -> int:
        """How many of the first ranks hold all that are open in a mask; read from the device when it changes only."""
        if mask.is_inference():
            return len(mask)
        if self._prefix is None or self._prefix[0] is not mask or self._prefix[1] != mask._version:
            places = mask.nonzero()
            self._prefix = mask, mask._version, int(places[-1]) + 1 if len(places) else 0
        return self._prefix[2]

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy `values` in; tensors not named keep theirs."""
        self.edits += 1
        write([getattr(self, name) for name in values], list(values.values()))
        self._await_gradient()

    @property
    def from_gradient(self) -> dict[str, Tensor]:
        """The start that a step would take up now; see `FoundStarts`."""
        return self.starts.of(self.observed_gradient())

    def observed_gradient(self) -> Tensor | None:
        """The gradient that tells which backward passes a step's gradients come from."""
        return None if self._observed is None else self._observed[0].grad

    def observe_gradients(self) -> None:
        """Let `starts` know which backward passes accumulate gradients; of a frozen layer nothing is to be known."""
        parameter = next((p for p in self.trained() if p.requires_grad), None)
        if parameter is None or (self._observed is not None and self._observed[0] is parameter):
            return
        self._stop_observing()
        self._observed = parameter, parameter.register_post_accumulate_grad_hook(lambda p: self.starts.accumulate(p))

    def _stop_observing(self) -> None:
        if self._observed is not None:
            self._observed[1].remove()
            self._observed = None

    def forget_starts(self) -> None:
        """Those found so far have had their step, or another batch gives the start."""
        self.starts = FoundStarts()

    def _await_gradient(self) -> None:
        self._stop_observing()
        self.forget_starts()
        waiting = [getattr(self, name) for name, slot in self.slots.items() if slot.from_gradient]
        self.awaits_gradient = any(not t.is_meta and not bool(whole(t).any()) for t in waiting)

    def share(self, peers: Any) -> None:
        """Take the buffers that the first process of a group holds."""
        share(list(self.buffers()), peers)
        self.edits += 1
        self._prefix = None

    def rounded(self) -> bool:
        """Whether an exact parameter is of another dtype than it was made in."""
        return any(self.slots[name].trained and getattr(self, name).dtype != self.exact_dtype for name in self._exact)

    def restore_exact(self) -> None:
        """Put exact tensors that a trainer cast by hand back to float32."""
        for name in self._exact:
            tensor, trained = getattr(self, name), self.slots[name].trained
            dtype = self.exact_dtype if trained else torch.float32
            if tensor.dtype != dtype:
                self._round_start(name, tensor.dtype)
                tensor.data = tensor.data.to(dtype)
                self.edits += 1

    def follow_base_dtype(self, dtype: torch.dtype) -> None:
        """Hold every parameter in the base layer's dtype: what `autocast_adapter_dtype=False` asks for."""
        self.exact_dtype = dtype
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        self.edits += 1

    def check_finite(self, adapter: str) -> None:
        """Raise for NaN or infinity in what was loaded."""
        self.unchecked = False
        for name, tensor in self.named().items():
            if not tensor.is_meta and not torch.isfinite(tensor).all():
                raise AdapterFileError(f"tensor {name!r} of the loaded adapter {adapter!r} holds NaN or infinity")

    def __getstate__(self) -> dict[str, Any]:
        # A copy's mask counts its versions anew, and its parameters are others, without gradients or hooks.
        return self.__dict__ | {"_prefix": None, "_observed": None, "starts": FoundStarts()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterTensors:
        """Move as any module does, but do not let a cast round what is exact."""
        self.edits += 1
        before = {name: getattr(self, name).data for name in (*self.slots, PEAKS)}
        super()._apply(fn, recurse)
        for name, was in before.items():
            now = getattr(self, name)
            if (name == PEAKS or self.slots[name].exact) and now.dtype != was.dtype:
                now.data = was.to(now.device) if now.device.type != "meta" else now.data.to(was.dtype)
            elif now.dtype.itemsize > was.dtype.itemsize:
                self._round_start(name, was.dtype)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loaded tensors need no start: an SVD is never recomputed for a saved adapter."""
        state_dict = self._completed(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]
        loaded = {name: state_dict[prefix + name] for name in self.slots if prefix + name in state_dict}
        if loaded:
            self.awaits_start, self.unchecked = False, True
            self.edits += 1
            self._await_gradient()
        for name, tensor in loaded.items():
            if tensor.dtype.itemsize < getattr(self, name).dtype.itemsize:
                self._round_start(name, tensor.dtype)

    def _completed(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """The tensors of a whole layer of format 1 with those that came later; any other state dict as it is."""
        own = {prefix + name: name for name in (*self.slots, "progress", PEAKS)}
        missing = own.keys() - state_dict.keys()
        if {own[key] for key in missing} <= set(ADDED_IN_FORMAT_2):
            shapes = {key: getattr(self, own[key]) for key in missing}
            return dict(state_dict) | {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in shapes.items()}
        return state_dict

    def _round_start(self, parameter: str, dtype: torch.dtype) -> None:
        """Round the start of `parameter` as the parameter was rounded by a spell in `dtype`."""
        for name, slot in self.slots.items():
            if slot.start_of == parameter:
                start = getattr(self, name)
                start.data = start.data.to(dtype).to(start.dtype)

    def extra_repr(self) -> str:
        """Names and shapes, as `print(model)` shows them."""
        return ", ".join(f"{name}{slot.shape}" for name, slot in self.slots.items() if slot.trained)
