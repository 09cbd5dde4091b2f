"""Scores of a model with single ranks left out, and with single ranks alone, for far less than two forwards each.

Leaving a rank out changes nothing before its own block, and neither does adding one rank to the base model. So the
outputs of all blocks are kept from one run of each, every scored run starts at its rank's block, and many ranks share
one forward pass: the batch is repeated, and gates differ from sample to sample.

Models whose blocks cannot be told, or are called more than once, are scored run by run: slower, and the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankwise.adapters.layer import AdapterLinear, NotPerSampleError
from rankwise.adapters.roster import Roster
from rankwise.training.development import Batch, evaluation, loss_of, model_of, on_device_of

STACKED_ENTRIES = 4096
"""Tokens of a stacked forward pass: enough to fill the machine, few enough for its caches and memory."""


class Scores(NamedTuple):
    """−loss with every rank, without each rank and with each rank alone: one (r,) tensor per layer, NaN if unused."""

    whole: float
    without: list[Tensor]
    alone: list[Tensor]


def can_ablate(roster: Roster) -> bool:
    """Whether there is a model and data to score it on."""
    given = getattr(roster.method, "score_batch", None) is not None
    return roster.model is not None and (given or roster.development is not None)


def ablate(roster: Roster) -> Scores:
    """Score every rank in use on the development batch, in evaluation mode."""
    model, layers, adapter = model_of(roster), roster.layers, roster.adapter
    given: Any = getattr(roster.method, "score_batch", None)
    with evaluation(model):
        kept = [layer.kept(adapter) for layer in layers]
        if callable(given):
            return one_by_one(partial(_number, given, model), layers, adapter, kept)
        batches = [given] if given is not None else roster.development()  # type: ignore[misc]  see can_ablate
        batches = [on_device_of(model, batch) for batch in batches]
        found = [_of_batch(model, batch, layers, adapter, kept) for batch in batches]
        return _mean(found, [samples_of(batch) for batch in batches])


def one_by_one(
    score: Callable[[], float], layers: Sequence[AdapterLinear], adapter: str, kept: Sequence[Tensor]
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


def _of_batch(
    model: nn.Module, batch: Batch, layers: Sequence[AdapterLinear], adapter: str, kept: Sequence[Tensor]
) -> Scores:
    replay = Replay(model, batch, layers, adapter)
    if replay.starts is not None:
        try:
            return replay.scores(kept)
        except NotPerSampleError:
            pass
    return one_by_one(lambda: -float(loss_of(model, batch)), layers, adapter, kept)


def _number(score: Callable[[nn.Module], Any], model: nn.Module) -> float:
    return float(score(model))


def _mean(found: Sequence[Scores], samples: Sequence[int]) -> Scores:
    """The mean over batches, by their number of samples."""
    weights = [n / sum(samples) for n in samples]
    without, alone = (
        [torch.stack([w * t for w, t in zip(weights, parts, strict=True)]).sum(0) for parts in zip(*each, strict=True)]
        for each in ([s.without for s in found], [s.alone for s in found])
    )
    return Scores(sum(w * s.whole for w, s in zip(weights, found, strict=True)), without, alone)


def _unscored(kept: Sequence[Tensor]) -> list[Tensor]:
    return [torch.full(mask.shape, torch.nan) for mask in kept]


def _ranks(kept: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(layer, rank) of every rank in use."""
    return [(i, j) for i, mask in enumerate(kept) for j in mask.nonzero().flatten().tolist()]


def samples_of(batch: Batch) -> int:
    """How many samples a batch holds: the first dimension of its first tensor."""
    return next(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim())


@contextmanager
def gated(layers: Sequence[AdapterLinear], adapter: str, gates: Mapping[int, Tensor | None]) -> Iterator[None]:
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


class Replay:
    """One batch through a model whose blocks can be skipped: the runs with all ranks, and with none, kept by block."""

    def __init__(self, model: nn.Module, batch: Batch, layers: Sequence[AdapterLinear], adapter: str) -> None:
        self.model, self.batch, self.layers, self.adapter = model, batch, layers, adapter
        self.samples = samples_of(batch)
        self.blocks = blocks_of(model, layers)
        self.everything = range(len(layers))
        self.starts = self._record()

    # --- what is kept -----------------------------------------------------------------------------------------------

    def _record(self) -> list[int] | None:
        """The two whole runs; how many blocks are done before each layer runs. None where blocks cannot be replayed."""
        done: list[nn.Module] = []
        starts: dict[nn.Module, int] = {}

        def note(layer: nn.Module, _: Any) -> None:
            starts.setdefault(layer, len(done))

        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_hook(block.register_forward_hook(lambda m, *_: done.append(m))))
            for layer in self.layers:
                stack.enter_context(_hook(layer.register_forward_pre_hook(note)))
            loss_of(self.model, self.batch)
        if not done or len(set(done)) != len(done):
            return None
        self.blocks = done
        with self._recording() as self.with_all:
            self.whole = -float(loss_of(self.model, self.batch))
        with gated(self.layers, self.adapter, dict.fromkeys(self.everything)), self._recording() as self.with_none:
            self.base = -float(loss_of(self.model, self.batch))
        return [starts.get(layer, -1) for layer in self.layers]

    @contextmanager
    def _recording(self) -> Iterator[list[Any]]:
        outputs: list[Any] = []
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_hook(block.register_forward_hook(lambda m, i, output: outputs.append(output))))
            yield outputs

    # --- scores -----------------------------------------------------------------------------------------------------

    def scores(self, kept: Sequence[Tensor]) -> Scores:
        """Every rank in use, block by block."""
        assert self.starts is not None
        without, alone = _unscored(kept), _unscored(kept)
        groups: dict[int, list[tuple[int, int]]] = {}
        for i, j in _ranks(kept):
            groups.setdefault(self.starts[i], []).append((i, j))
        for start, ranks in groups.items():
            for found, values in ((without, self._group(start, ranks, 1)), (alone, self._group(start, ranks, 0))):
                for (i, j), value in zip(ranks, values, strict=True):
                    found[i][j] = value
        return Scores(self.whole, without, alone)

    def _group(self, start: int, ranks: Sequence[tuple[int, int]], others: int) -> list[float]:
        """Scores of ranks of one block, each left out of all (`others` = 1) or alone (0)."""
        if start < 0:  # a layer that this batch does not reach
            return [self.whole if others else self.base] * len(ranks)
        kept = self.with_all if others else self.with_none
        if start == len(self.blocks):  # behind the last block: there is next to nothing to run
            return [self._tail(kept, self._gates([rank], others, None)) for rank in ranks]
        tokens = max(t.numel() for t in self.batch.values() if isinstance(t, Tensor))
        size = max(1, STACKED_ENTRIES // tokens)
        return [v for at in range(0, len(ranks), size) for v in self._stacked(start, ranks[at : at + size], others)]

    def _gates(self, ranks: Sequence[tuple[int, int]], others: int, samples: int | None) -> dict[int, Tensor | None]:
        """Gates of the ranks' layers, (len(ranks) · samples, r) or (r,) for a single rank; others are whole, or off."""
        gates: dict[int, Tensor | None] = {} if others else dict.fromkeys(self.everything)
        for i in {i for i, _ in ranks}:
            tensors = self.layers[i].tensors(self.adapter)
            gate = torch.full((len(ranks), tensors.size.r), float(others), device=next(tensors.parameters()).device)
            for row, (k, j) in enumerate(ranks):
                if k == i:
                    gate[row, j] = 1 - others
            gates[i] = gate[0] if samples is None else gate.repeat_interleave(samples, 0)
        return gates

    def _stacked(self, start: int, ranks: Sequence[tuple[int, int]], others: int) -> list[float]:
        """One forward pass from block `start` on for all the ranks, then the model's own loss for each."""
        copies, kept = len(ranks), self.with_all if others else self.with_none
        outputs: list[Any] = [_repeat(output, copies, self.samples) for output in kept[:start]]
        with (
            gated(self.layers, self.adapter, self._gates(ranks, others, self.samples)),
            self._skipping(outputs),
            self._leaving(outputs),
            suppress(_LastBlock),
        ):
            self.model(**_repeat(dict(self.batch), copies, self.samples))
        off = {} if others else dict.fromkeys(self.everything)
        return [self._tail([_slice(o, k, copies, self.samples) for o in outputs], off) for k in range(copies)]

    def _tail(self, outputs: Sequence[Any], gates: Mapping[int, Tensor | None]) -> float:
        with gated(self.layers, self.adapter, gates), self._skipping(outputs):
            return -float(loss_of(self.model, self.batch))

    @contextmanager
    def _skipping(self, outputs: Sequence[Any]) -> Iterator[None]:
        """The first blocks give these outputs instead of running."""
        with ExitStack() as stack:
            for block, output in zip(self.blocks, list(outputs), strict=False):
                stack.enter_context(_forward(block, lambda *_, output=output, **__: output))
            yield

    @contextmanager
    def _leaving(self, outputs: list[Any]) -> Iterator[None]:
        """The other blocks append their outputs, and the last one ends the forward pass."""

        def note(_: nn.Module, __: Any, output: Any) -> None:
            outputs.append(output)
            if len(outputs) == len(self.blocks):
                raise _LastBlock

        with ExitStack() as stack:
            for block in self.blocks[len(outputs) :]:
                stack.enter_context(_hook(block.register_forward_hook(note)))
            yield


def blocks_of(model: nn.Module, layers: Sequence[AdapterLinear]) -> list[nn.Module]:
    """The outermost repeated blocks that hold adapted layers: the children of `ModuleList`s."""
    adapted = set(layers)
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and not adapted.isdisjoint(child.modules()):
                found.extend(child)
            elif not isinstance(child, AdapterLinear):
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


def _over_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to the tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)({key: _over_tensors(item, change) for key, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_over_tensors(item, change) for item in value)
    return value


def _repeat(value: Any, copies: int, samples: int) -> Any:
    """Copies behind one another of what has one row per sample."""
    return _over_tensors(
        value, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)) if t.dim() and t.shape[0] == samples else t
    )


def _slice(value: Any, k: int, copies: int, samples: int) -> Any:
    """Copy k of what was repeated."""
    rows = slice(k * samples, (k + 1) * samples)
    return _over_tensors(value, lambda t: t[rows] if t.dim() and t.shape[0] == copies * samples else t)
