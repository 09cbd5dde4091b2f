"""Scores of a model with single ranks left out, and with single ranks alone, for far less than two forwards each.

Leaving a rank out changes nothing before its own layer, and neither does adding one rank to the base model. So the
outputs of modules are kept from one run of each, every scored run starts at its rank's layer, and many ranks share one
forward pass: the batch is repeated, and gates differ from sample to sample.

Models whose blocks cannot be told, or are called more than once, are scored run by run: slower, and the same numbers.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankwise.adapters.layer import AdapterLayer
from rankwise.training.aside import Batch, loss_of
from rankwise.training.nested import copy_of, repeat, repeat_batch, samples_of, tensors_of

STACKED_ENTRIES = {"cpu": 1024, "cuda": 65536}
"""Tokens of a stacked forward pass, by device: enough to fill it. A CPU is full with a batch of 32 short sentences."""


class Scores(NamedTuple):
    """−loss with every rank, without each rank and with each rank alone: one (r,) tensor per layer, NaN if unused."""

    whole: float
    without: list[Tensor]
    alone: list[Tensor]


def one_by_one(
    score: Callable[[], float], layers: Sequence[AdapterLayer], adapter: str, kept: Sequence[Tensor]
) -> Scores:
    """The plain way: two runs of the model for every rank."""
    whole = score()
    without, alone = _unscored(kept), _unscored(kept)
    for i, j in _ranks(kept):
        one = torch.zeros_like(kept[i], dtype=torch.float32)
        one[j] = 1
        with gated(layers, adapter, {i: 1 - one}):
            without[i][j] = score()
        with gated(layers, adapter, dict.fromkeys(range(len(layers))) | {i: one}):
            alone[i][j] = score()
    return Scores(whole, without, alone)


def _unscored(kept: Sequence[Tensor]) -> list[Tensor]:
    return [torch.full(mask.shape, torch.nan, dtype=torch.float32) for mask in kept]


def _ranks(kept: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(layer, rank) of every rank in use."""
    return [(i, j) for i, mask in enumerate(kept) for j in mask.nonzero().flatten().tolist()]


@contextmanager
def gated(layers: Sequence[AdapterLayer], adapter: str, gates: Mapping[int, Tensor | None]) -> Iterator[None]:
    """Gates on some layers, by index: (r,) for all samples, (samples, r) for each, None for no update at all."""
    try:
        for i, gate in gates.items():
            layers[i].gates[adapter] = gate
        yield
    finally:
        for i in gates:
            layers[i].gates.pop(adapter, None)


class _LastBlock(Exception):  # noqa: N818  no error: the rest of the model is not needed
    """Leaves a forward pass after its last block."""


class Call(NamedTuple):
    """When a module ran in one forward pass, by a clock that ticks at every start and end."""

    module: nn.Module
    start: int
    end: int


class Replay:
    """One batch through a model whose modules can be skipped: what they gave with all ranks, and with none, is kept.

    A module that ended before a rank's layer began gives what it gave; so does an adapted layer that sees the very
    input it saw, and the layer itself, with the rank's share added or taken away. What is left are the rest of the
    layer's block and the blocks behind it.
    """

    def __init__(self, model: nn.Module, batch: Batch, layers: Sequence[AdapterLayer], adapter: str) -> None:
        self.model, self.batch, self.layers, self.adapter = model, batch, layers, adapter
        self.samples = samples_of(batch)
        self.everything = range(len(layers))
        self.calls = self._timed()
        once = {call.module for call in self.calls}
        self.blocks = blocks_of(model, layers)
        self.replayable = bool(self.blocks) and once.issuperset(self.blocks) and once | self.unused >= set(layers)
        if self.replayable:
            self._record()

    # --- what is kept -----------------------------------------------------------------------------------------------

    def _timed(self) -> list[Call]:
        """The modules that run exactly once, by their start; and which of their outputs grow with the batch."""
        clock, starts, ends = itertools.count(), defaultdict[nn.Module, list[int]](list), dict[nn.Module, int]()
        sizes: list[dict[nn.Module, list[int]]] = []

        def ended(module: nn.Module, _: Any, output: Any) -> None:
            ends[module] = next(clock)
            sizes[-1][module] = [t.shape[0] if t.dim() else 0 for t in tensors_of(output)]

        with ExitStack() as stack:
            for module in list(self.model.modules())[1:]:
                note = module.register_forward_pre_hook(lambda m, _: starts[m].append(next(clock)))
                stack.enter_context(_hook(note))
                stack.enter_context(_hook(module.register_forward_hook(ended)))
            for copies in (2, 1):
                starts.clear()
                sizes.append({})
                loss_of(self.model, repeat_batch(self.batch, copies, self.samples))
        twice, once = sizes
        self.grows = {m: [a == 2 * b for a, b in zip(twice[m], found, strict=True)] for m, found in once.items()}
        self.unused = set(self.model.modules()) - starts.keys()
        calls = [Call(module, times[0], ends[module]) for module, times in starts.items() if len(times) == 1]
        return sorted(calls, key=lambda call: call.start)

    def _record(self) -> None:
        """The two whole runs, and what the modules that will be skipped gave in them."""
        self.starts = {call.module: call.start for call in self.calls}
        last = max(call.end for call in self.calls if call.module in self.blocks)
        self.behind = self._finished(last + 1)
        kept = {call.module for layer in self.layers for call in self._finished(self.starts.get(layer, 0))}
        kept |= {call.module for call in self.behind} | set(self.layers)
        with self._recording(kept) as self.with_all:
            self.whole = -float(loss_of(self.model, self.batch))
        with gated(self.layers, self.adapter, dict.fromkeys(self.everything)), self._recording(kept) as self.with_none:
            self.base = -float(loss_of(self.model, self.batch))

    def _finished(self, time: int) -> list[Call]:
        """The outermost modules that ended before a time."""
        found: list[Call] = []
        for call in self.calls:
            if call.end < time and (not found or call.start > found[-1].end):
                found.append(call)
        return found

    @contextmanager
    def _recording(self, modules: set[nn.Module]) -> Iterator[dict[nn.Module, tuple[Any, Any]]]:
        """Input and output of modules. What is changed in place later on cannot stand in for them."""
        seen: dict[nn.Module, tuple[Any, Any]] = {}
        versions: list[tuple[Tensor, int]] = []

        def note(module: nn.Module, x: Any, y: Any) -> None:
            seen[module] = (x[0] if x else None, y)
            versions.extend((t, t._version) for t in tensors_of(y))

        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(_hook(module.register_forward_hook(note)))
            yield seen
        self.replayable &= all(t._version == version for t, version in versions)

    # --- scores -----------------------------------------------------------------------------------------------------

    def scores(self, kept: Sequence[Tensor]) -> Scores:
        """Every rank in use, layer by layer."""
        without, alone = _unscored(kept), _unscored(kept)
        for i, mask in enumerate(kept):
            ranks = mask.nonzero().flatten().tolist()
            for found, others in ((without, 1), (alone, 0)):
                found[i][ranks] = torch.tensor(self._layer(i, ranks, others), dtype=found[i].dtype)
        return Scores(self.whole, without, alone)

    def _layer(self, i: int, ranks: Sequence[int], others: int) -> list[float]:
        """Scores of one layer's ranks, each left out of all (`others` = 1) or alone (0)."""
        start = self.starts.get(self.layers[i])
        if start is None:
            # The batch does not reach this layer, so its ranks change nothing.
            unchanged = self.whole if others else self.base
            return [unchanged] * len(ranks)
        if start > max(call.end for call in self.behind):
            # The layer lies behind the last block. Next to nothing is left to run, so each rank runs by itself.
            outputs = self._known(self.behind, others) | self._own(i, others)
            return [self._tail(outputs, self._gates(i, [j], others, None), i) for j in ranks]

        # As many ranks share a forward pass as fill the device.
        tokens = max(t.numel() for t in self.batch.values() if isinstance(t, Tensor))
        device = next(self.layers[i].parameters()).device.type
        entries = STACKED_ENTRIES.get(device, STACKED_ENTRIES["cuda"])
        together = max(1, entries // tokens)
        scores: list[float] = []
        for first in range(0, len(ranks), together):
            scores += self._stacked(i, ranks[first : first + together], others)
        return scores

    def _own(self, i: int, others: int) -> dict[nn.Module, Any]:
        """What layer i itself gave, in place of its base layer: a rank's own share is then added, or taken away."""
        return {self.layers[i].get_base_layer(): (self.with_all if others else self.with_none)[self.layers[i]][1]}

    def _gates(self, i: int, ranks: Sequence[int], others: int, samples: int | None) -> dict[int, Tensor | None]:
        """Gates of layer i on top of `_own`, (len(ranks) · samples, r) or (r,); other layers are whole, or off."""
        tensors = self.layers[i].tensors(self.adapter)
        device = next(tensors.parameters()).device
        gate = torch.zeros(len(ranks), tensors.size.r, dtype=torch.float32, device=device)
        gate[range(len(ranks)), list(ranks)] = -1.0 if others else 1.0
        gates: dict[int, Tensor | None] = {} if others else dict.fromkeys(self.everything)
        return gates | {i: gate[0] if samples is None else gate.repeat_interleave(samples, 0)}

    def _known(self, calls: Sequence[Call], others: int) -> dict[nn.Module, Any]:
        kept = self.with_all if others else self.with_none
        return {call.module: kept[call.module][1] for call in calls}

    def _stacked(self, i: int, ranks: Sequence[int], others: int) -> list[float]:
        """One forward pass from the layer on for all the ranks, then the model's own loss for each."""
        copies, layer = len(ranks), self.layers[i]

        # What ended before the layer began gives what it gave, once for each rank. So does the layer's base.
        known = self._known(self._finished(self.starts[layer]), others)
        outputs = {module: repeat(output, copies, self.grows[module]) for module, output in known.items()}
        own = {module: repeat(output, copies, self.grows[layer]) for module, output in self._own(i, others).items()}
        repeated_inputs = self._same_inputs(layer, known, outputs, copies, others)

        gates = self._gates(i, ranks, others, self.samples if copies > 1 else None)
        with self._gated(gates, i), self._skipping(outputs | own), self._same(repeated_inputs):
            if copies == 1:
                return [-float(loss_of(self.model, self.batch))]
            with self._leaving(outputs), suppress(_LastBlock):
                self.model(**repeat_batch(self.batch, copies, self.samples))

        # The pass has put the last block's output among them. Each rank's part then has the model's own loss.
        gates_of_the_tail: dict[int, Tensor | None] = {} if others else dict.fromkeys(self.everything)
        scores: list[float] = []
        for copy in range(copies):
            part = {m: copy_of(output, copy, copies, self.grows[m]) for m, output in outputs.items()}
            scores.append(self._tail(part, gates_of_the_tail))
        return scores

    def _same_inputs(
        self,
        layer: AdapterLayer,
        known: Mapping[nn.Module, Any],
        repeated: Mapping[nn.Module, Any],
        copies: int,
        others: int,
    ) -> dict[nn.Module, tuple[Any, Any]]:
        """The layers that read the same input as this one, as keys and values beside a query: their input and output.

        Args:
            layer: the layer whose ranks are scored.
            known: what modules gave that ended before it began.
            repeated: the same, repeated for each rank.
            copies: how often.
            others: whether all other ranks are on (1) or off (0).
        """
        kept = self.with_all if others else self.with_none
        # Each tensor among the known outputs, and what stands for it in the repeated pass.
        repeated_of: dict[int, Tensor] = {}
        for module, output in known.items():
            for tensor, copy in zip(tensors_of(output), tensors_of(repeated[module]), strict=True):
                repeated_of[id(tensor)] = copy

        shared_input = kept[layer][0]
        if id(shared_input) not in repeated_of:
            return {}
        found: dict[nn.Module, tuple[Any, Any]] = {}
        for other in self.layers:
            if other is layer or other not in kept:
                continue
            other_input, other_output = kept[other]
            if other_input is shared_input:
                found[other] = (repeated_of[id(shared_input)], repeat(other_output, copies, self.grows[other]))
        return found

    def _tail(
        self, outputs: Mapping[nn.Module, Any], gates: Mapping[int, Tensor | None], i: int | None = None
    ) -> float:
        with self._gated(gates, i), self._skipping(outputs):
            return -float(loss_of(self.model, self.batch))

    @contextmanager
    def _gated(self, gates: Mapping[int, Tensor | None], i: int | None) -> Iterator[None]:
        """Gates of the adapter; on layer i other adapters, which are in what it gave, are off."""
        with gated(self.layers, self.adapter, gates), ExitStack() as stack:
            for layer in () if i is None else self.layers[i : i + 1]:
                for other in set(layer.active_adapters) - {self.adapter}:
                    stack.enter_context(gated([layer], other, {0: None}))
            yield

    @contextmanager
    def _skipping(self, outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
        """Modules that give these outputs instead of running."""
        with ExitStack() as stack:
            for module, output in outputs.items():
                stack.enter_context(_forward(module, lambda *_, output=output, **__: output))
            yield

    @contextmanager
    def _same(self, seen: Mapping[nn.Module, tuple[Any, Any]]) -> Iterator[None]:
        """Layers that give what they gave if they see the very tensor they saw."""
        with ExitStack() as stack:
            for module, (x, y) in seen.items():

                def forward(now: Any, *_: Any, x: Any = x, y: Any = y, own: Any = module.forward, **__: Any) -> Any:
                    return y if now is x else own(now, *_, **__)

                stack.enter_context(_forward(module, forward))
            yield

    @contextmanager
    def _leaving(self, outputs: dict[nn.Module, Any]) -> Iterator[None]:
        """The blocks and what stands beside them note their outputs; behind the last one the forward pass ends."""
        awaited = [call.module for call in self.behind if call.module not in outputs]

        def note(module: nn.Module, _: Any, output: Any) -> None:
            outputs[module] = output
            if module is awaited[-1]:
                raise _LastBlock

        with ExitStack() as stack:
            for module in awaited:
                stack.enter_context(_hook(module.register_forward_hook(note)))
            yield


def blocks_of(model: nn.Module, layers: Sequence[AdapterLayer]) -> list[nn.Module]:
    """The outermost repeated blocks that hold adapted layers: the children of `ModuleList`s."""
    adapted = set(layers)
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and not adapted.isdisjoint(child.modules()):
                found.extend(child)
            elif not isinstance(child, AdapterLayer):
                search(child)

    search(model)
    return found


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _forward(block: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    own = block.__dict__.get("forward")
    block.forward = replacement  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own  # type: ignore[method-assign]
