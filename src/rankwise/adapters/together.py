"""What a pass makes of an adapter's tensors, made for all layers of one shape at once.

NB-LoRA's factors, SaLoRA's gates and Deep LoRA's products take many small operations a layer (`Method.prepare`). A
model of 24 layers launches them once, not 24 times: when a training pass begins, tensors of one shape are stacked, the
method works on the stack, and each layer takes its slice. Gradients come back the same way.

When it begins, and not at the first layer that runs: with checkpointing, what is made within a block is made again
with that block. Each layer makes its own, as it would by itself, wherever that is not plainly the same:

- no pass of the whole PEFT model has begun, or the graph is compiled, traced or transformed;
- reentrant checkpointing: a block runs without gradients first, and is run again, with a graph of its own;
- a start is awaited, tensors are spread over processes or elsewhere, another adapter is active too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.derivatives import by_hand

if TYPE_CHECKING:
    from rankwise.adapters.layer import AdapterLayer
    from rankwise.adapters.tensors import AdapterTensors
    from rankwise.methods.base import Method

Made = dict[str, Tensor]


class Together:
    """What has been made for the layers of one adapter.

    Args:
        adapter: the adapter's name.
        method: its method.
    """

    def __init__(self, adapter: str, method: Method) -> None:
        self._adapter = adapter
        self._method = method
        self._made: dict[int, Made] = {}  # by the id of a layer's tensors, which live as long as the model
        self._in_pass = False

    @contextmanager
    def one_pass(self, layers: Sequence[AdapterLayer]) -> Iterator[None]:
        """Around a forward pass of the whole model: make what its layers will take."""
        if not self._can_be_made(layers):
            yield
            return
        self._made = {}
        members = [layer.tensors(self._adapter) for layer in layers]
        for alike in _grouped(self._method.prepared_from, members):
            made = _made_of_stacks(self._method, alike)
            self._made |= {id(tensors): each for tensors, each in zip(alike, made, strict=True)}
        self._in_pass = True
        try:
            yield
        finally:
            self._in_pass = False

    def take(self, tensors: AdapterTensors) -> Made:
        """What was made for one layer; nothing where it shall make its own.

        Checkpointing runs a layer again in the backward pass, and must find what it has found in the forward pass: it
        is kept until the optimiser steps.
        """
        if not self._made:
            return {}
        runs_again = torch._C._current_graph_task_id() != -1  # within a backward pass
        if torch.is_grad_enabled():
            return self._made.get(id(tensors), {}) if self._in_pass or runs_again else {}
        if self._in_pass:
            # Reentrant checkpointing: its second run has a graph of its own, which cannot lead back to this pass.
            self._made.pop(id(tensors), None)
        return {}

    def forget(self) -> None:
        """The weights are about to move."""
        self._made = {}

    def _can_be_made(self, layers: Sequence[AdapterLayer]) -> bool:
        if not (self._method.prepared_from and torch.is_grad_enabled() and by_hand()):
            return False
        return all(self._is_plain(layer) for layer in layers)

    def _is_plain(self, layer: AdapterLayer) -> bool:
        """Whether a layer trains with this adapter alone, and its tensors are at hand."""
        device = layer.tensors(self._adapter).trained()[0].device
        if device.type == "cpu" and not self._method.prepares_on_cpu:
            return False
        if not layer.training or layer.disable_adapters or layer.merged or layer.active_adapters != [self._adapter]:
            return False
        tensors = layer.tensors(self._adapter)
        if tensors.awaits_start or tensors.awaits_gradient or "_hf_hook" in vars(tensors):
            return False
        own = tensors.named()
        return all(type(own[name]) in (Tensor, nn.Parameter) for name in self._method.prepared_from)


def _grouped(names: Sequence[str], members: Sequence[AdapterTensors]) -> list[list[AdapterTensors]]:
    """By shape, dtype and device of some of their tensors, and by which of these train."""
    found: dict[Any, list[AdapterTensors]] = {}
    for tensors in members:
        tensors.restore_exact()
        own = tensors.named()
        kind = tuple((own[name].shape, own[name].dtype, own[name].device, own[name].requires_grad) for name in names)
        found.setdefault(kind, []).append(tensors)
    return list(found.values())


def _made_of_stacks(method: Method, alike: Sequence[AdapterTensors]) -> list[Made]:
    """What the method prepares of each of some layers of one shape."""
    layers = len(alike)
    named = [tensors.named() for tensors in alike]
    names = method.prepared_from
    members = [[own[name] for own in named] for name in names]
    # Filled in the backward pass: the slices note which layers had a gradient, and the stacks read it.
    reached: list[int] = []
    stacks = _Stacked.apply(reached, len(names), *itertools.chain.from_iterable(members))
    with _stacks_are_not_kept(stacks, members):
        made = method.prepare(dict(zip(names, stacks, strict=True)))
    slices = _Slices.apply(reached, layers, *made.values())
    # Slices lie one stack after the other, so that every `layers`-th one is of the same layer.
    return [dict(zip(made, slices[layer::layers], strict=True)) for layer in range(layers)]


@contextmanager
def _stacks_are_not_kept(stacks: Sequence[Tensor], members: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """What is computed within saves the tensors in the place of their stacks, which are as large as the adapter.

    Args:
        stacks: made of `members`, stack by stack.
        members: the tensors.
    """
    places = {stack.data_ptr(): i for i, stack in enumerate(stacks)}
    shapes = [stack.shape for stack in stacks]
    versions = [[t._version for t in tensors] for tensors in members]

    def pack(saved: Tensor) -> Tensor | int:
        i = places.get(saved.data_ptr())
        return saved if i is None or saved.shape != shapes[i] else i

    def unpack(kept: Tensor | int) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if [t._version for t in members[kept]] != versions[kept]:
            raise RuntimeError("a parameter of an adapter was modified in place between a pass and its backward pass")
        return torch.stack([t.detach() for t in members[kept]])

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Stacked(torch.autograd.Function):
    """Tensors of n layers, one name after the other, as one stack for each name.

    A layer that the loss has not reached gets no gradient, as if it had been alone, rather than zeros, by which an
    optimiser's momentum would move it.
    """

    @staticmethod
    def forward(ctx: Any, reached: list[int], names: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The stacks."""
        ctx.set_materialize_grads(False)
        ctx.reached, ctx.layers = reached, len(tensors) // names
        firsts = range(0, len(tensors), ctx.layers)
        stacks = [torch.stack(tensors[i : i + ctx.layers]) for i in firsts]
        trains = [ctx.needs_input_grad[2 + i] for i in firsts]
        ctx.mark_non_differentiable(*(stack for stack, wanted in zip(stacks, trains, strict=True) if not wanted))
        return tuple(stacks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The slices of the gradients, of layers that were reached."""
        found: list[Tensor | None] = []
        for gradient in gradients:
            slices = [None] * ctx.layers if gradient is None else gradient.unbind(0)
            found += [each if k in ctx.reached else None for k, each in enumerate(slices)]
        return None, None, *found


class _Slices(torch.autograd.Function):
    """The slices of some stacks, one stack after the other; in the backward pass, notes whose slices had a gradient."""

    @staticmethod
    def forward(ctx: Any, reached: list[int], layers: int, *stacks: Tensor) -> tuple[Tensor, ...]:
        """The slices."""
        ctx.set_materialize_grads(False)
        ctx.reached, ctx.layers = reached, layers
        ctx.like = [(stack.shape[1:], stack.dtype, stack.device) for stack in stacks]
        return tuple(each for stack in stacks for each in stack.unbind(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the stacks."""
        n = ctx.layers
        ctx.reached[:] = [k for k in range(n) if any(g is not None for g in gradients[k::n])]
        found: list[Tensor | None] = []
        for i, (shape, dtype, device) in enumerate(ctx.like):
            own = gradients[i * n : (i + 1) * n]
            if all(g is None for g in own):
                found.append(None)
                continue
            found.append(torch.stack([torch.zeros(shape, dtype=dtype, device=device) if g is None else g for g in own]))
        return None, None, *found
