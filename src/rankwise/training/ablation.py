"""Scores of a model with single ranks left out, and with single ranks alone, for far less than two forwards each.

Leaving a rank out changes nothing that is computed before its layer, and neither does adding one rank to the base
model. So one run with all ranks and one with none are kept, and a scored run only makes the calls that its rank can
change: earlier blocks, and the parts of its own block that come first, answer from what is kept. Many ranks share one
such run: the batch is repeated, and gates differ from copy to copy. The loss is then the model's own, for each copy.

Two ranks are scored the plain way as well. Where the numbers differ, or a model cannot be run like this (samples that
look at each other, layers that see something other than samples), all ranks are: slower, and always right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.roster import Roster
from rankwise.errors import ArgumentError
from rankwise.training.development import (
    Answer,
    Batch,
    Call,
    calls_of,
    check_untouched,
    evaluation,
    finished,
    loss_of,
    model_of,
    on_device_of,
    play,
    repeated,
    row_block,
    versions_of,
)

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
    """Score every rank in use on the development batch, in evaluation mode; processes agree on the mean.

    Raises:
        ArgumentError: there is no data, or the whole model's score is NaN or infinite.
    """
    model, layers, adapter = model_of(roster), roster.layers, roster.adapter
    given: Any = getattr(roster.method, "score_batch", None)
    with evaluation(model):
        kept = [layer.kept(adapter).cpu() for layer in layers]
        if callable(given):
            found, weights = [one_by_one(partial(_number, given, model), layers, adapter, kept)], [1]
        else:
            batches = [given] if given is not None else roster.development()  # type: ignore[misc]  see can_ablate
            batches = [on_device_of(model, batch) for batch in batches]
            found = [_of_batch(model, batch, layers, adapter, kept) for batch in batches]
            weights = [samples_of(batch) for batch in batches]
    mean = _mean(found, weights, next(model.parameters()).device)
    if not math.isfinite(mean.whole):
        raise ArgumentError("score_batch", "give a finite score (does it hold labels that count?)", mean.whole)
    return mean


# --- the plain way --------------------------------------------------------------------------------------------------


def one_by_one(
    score: Callable[[], float], layers: Sequence[AdapterLayer], adapter: str, kept: Sequence[Tensor]
) -> Scores:
    """Two runs of the model for every rank."""
    whole = score()
    without, alone = _unscored(kept), _unscored(kept)
    for i, j in _ranks(kept):
        one = torch.zeros(len(kept[i]), device=_device(layers[i], adapter))
        one[j] = 1
        with gated(layers, adapter, {i: 1 - one}):
            without[i][j] = score()
        with gated(layers, adapter, dict.fromkeys(range(len(layers))) | {i: one}):
            alone[i][j] = score()
    return Scores(whole, without, alone)


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


def samples_of(batch: Batch) -> int:
    """How many samples a batch holds: the first dimension of its first tensor."""
    found = next((value for value in batch.values() if isinstance(value, Tensor) and value.dim()), None)
    if found is None:
        raise ArgumentError("score_batch", "hold tensors, one row per sample", sorted(batch))
    return found.shape[0]


def _number(score: Callable[[nn.Module], Any], model: nn.Module) -> float:
    return _worst(float(score(model)))


def _worst(score: float) -> float:
    """A score that cannot be computed is as bad as can be."""
    return -math.inf if math.isnan(score) else score


def _ranks(kept: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(layer, rank) of every rank in use."""
    return [(i, j) for i, mask in enumerate(kept) for j in mask.nonzero().flatten().tolist()]


def _unscored(kept: Sequence[Tensor]) -> list[Tensor]:
    return [torch.full(mask.shape, torch.nan, dtype=torch.float64) for mask in kept]


def _device(layer: AdapterLayer, adapter: str) -> torch.device:
    return next(layer.tensors(adapter).parameters()).device


# --- means over batches and processes -------------------------------------------------------------------------------


def _mean(found: Sequence[Scores], weights: Sequence[int], device: torch.device) -> Scores:
    """The mean over batches and processes, by their number of samples; the same to the bit on every process."""
    if not found:
        raise ArgumentError("score_batch", "hold samples", "an empty development set")
    flat = [torch.cat([torch.tensor([s.whole], dtype=torch.float64), *s.without, *s.alone]) for s in found]
    total = torch.stack([n * scores for n, scores in zip(weights, flat, strict=True)]).sum(0)
    total = torch.cat([total, total.new_tensor([sum(weights)])])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = total.to(device)
        torch.distributed.all_reduce(total)
    *scores, count = total.cpu().split([1, *(len(t) for t in (*found[0].without, *found[0].alone)), 1])
    whole, *parts = (part / count for part in scores)
    return Scores(float(whole), parts[: len(parts) // 2], parts[len(parts) // 2 :])


# --- the fast way ---------------------------------------------------------------------------------------------------


def _of_batch(
    model: nn.Module, batch: Batch, layers: Sequence[AdapterLayer], adapter: str, kept: Sequence[Tensor]
) -> Scores:
    def plain(kept: Sequence[Tensor]) -> Scores:
        return one_by_one(lambda: _worst(-float(loss_of(model, batch))), layers, adapter, kept)

    with suppress(Exception):  # whatever the fast way stumbles over, the plain way either can do or reports
        found = Replay(model, batch, layers, adapter).scores(kept)
        if _agree(found, plain(_two_of(kept)), _tolerance(model)):
            return found
    return plain(kept)


def _two_of(kept: Sequence[Tensor]) -> list[Tensor]:
    """The first and the last rank in use alone."""
    masks = [torch.zeros_like(mask) for mask in kept]
    for i, j in [*_ranks(kept)[:1], *_ranks(kept)[-1:]]:
        masks[i][j] = True
    return masks


def _agree(found: Scores, plain: Scores, tolerance: float) -> bool:
    """Whether all that the plain way has scored is the same to rounding."""
    pairs = [(found.whole, plain.whole)]
    for ours, theirs in zip((*found.without, *found.alone), (*plain.without, *plain.alone), strict=True):
        scored = ~theirs.isnan()
        pairs += zip(ours[scored].tolist(), theirs[scored].tolist(), strict=True)
    return all(a == b or abs(a - b) <= tolerance * max(abs(b), 0.1) for a, b in pairs)


def _tolerance(model: nn.Module) -> float:
    """How far two ways to sum the same may be apart in the model's precision."""
    coarsest = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    exact = torch.get_float32_matmul_precision() == "highest"
    return min(256 * coarsest, 0.02) if exact else 0.02


class Replay:
    """One batch through a model whose calls are known: the outputs with all ranks and with none are kept.

    Only one block's inner outputs are held at a time; a `unit` is a block, or a call outside of blocks.
    """

    def __init__(self, model: nn.Module, batch: Batch, layers: Sequence[AdapterLayer], adapter: str) -> None:
        self.model, self.batch, self.layers, self.adapter = model, batch, layers, adapter
        self.samples, self.blocks = samples_of(batch), blocks_of(model, layers)
        self.calls, loss = calls_of(model, batch)
        made = [[call for call in self.calls if call.module is layer] for layer in layers]
        self.first = [calls[0] if calls else None for calls in made]
        self.once = [len(calls) == 1 for calls in made]
        self.callers = {call.parent for call in self.calls}
        last = max((self._unit(call) for calls in made for call in calls), key=lambda call: call.end)
        self.last, self.tail = last, finished(self.calls, last.end)
        self.outside = [c for c in self.calls if c.end <= last.end and self._unit(c) not in c.within()]
        base, with_none = self._play(batch, others=0, collect=self.outside)
        _, with_all = self._play(batch, others=1, collect=self.outside)
        self.kept = (with_none, with_all)
        self.versions = versions_of(list(with_none.values())) + versions_of(list(with_all.values()))
        self.whole, self.base = _worst(-loss), _worst(-base)

    def scores(self, kept: Sequence[Tensor]) -> Scores:
        """Every rank in use."""
        without, alone = _unscored(kept), _unscored(kept)
        units: dict[Call | None, list[int]] = {}
        for i, call in enumerate(self.first):
            units.setdefault(None if call is None else self._unit(call), []).append(i)
        for unit, members in units.items():
            for scores, others in ((without, 1), (alone, 0)):
                known = {} if unit is None else self._known(unit, others)
                for i in members:
                    ranks = kept[i].nonzero().flatten()
                    scores[i][ranks] = torch.tensor(self._layer(i, ranks.tolist(), others, known), dtype=torch.float64)
        check_untouched(self.versions)
        return Scores(self.whole, without, alone)

    def _unit(self, call: Call) -> Call:
        return next((c for c in reversed([call, *call.within()]) if c.module in self.blocks), call)

    def _play(self, batch: Batch, *, others: int, gates: Mapping[int, Tensor] | None = None, **how: Any) -> Any:
        """A played run with all other ranks (`others` = 1), or none (0)."""
        off = {} if others else dict.fromkeys(range(len(self.layers)))
        with gated(self.layers, self.adapter, off | dict(gates or {})):
            return play(self.model, batch, self.calls, **how)

    def _known(self, unit: Call, others: int) -> dict[Call, Any]:
        """The outputs of all calls outside of blocks, and of those inside this one."""
        kept = self.kept[others]
        inside = [call for call in self.calls if unit in call.within()]
        before = {call: partial(kept.get, call) for call in finished(self.calls, unit.start)}
        _, found = (
            self._play(self.batch, others=others, known=before, collect=inside, until=unit) if inside else (0, {})
        )
        return kept | found

    # --- one layer's ranks ------------------------------------------------------------------------------------------

    def _layer(self, i: int, ranks: Sequence[int], others: int, known: Mapping[Call, Any]) -> list[float]:
        """Scores of ranks of one layer, each left out of all (`others` = 1) or alone (0)."""
        call = self.first[i]
        if call is None:  # a layer that this batch does not reach
            return [self.whole if others else self.base] * len(ranks)
        size = 1
        if call.input is not None and call.input[0] == self.samples:
            size = max(1, STACKED_ENTRIES * known[call].shape[-1] // known[call].numel())
        if size > 1:
            with suppress(Exception):  # something in a run of copies is not one row per sample
                return [
                    s for at in range(0, len(ranks), size) for s in self._stack(i, ranks[at : at + size], others, known)
                ]
        return [score for j in ranks for score in self._stack(i, [j], others, known)]

    def _stack(self, i: int, ranks: Sequence[int], others: int, known: Mapping[Call, Any]) -> list[float]:
        """One run for several ranks from their layer on, up to the last adapted block; the rest for each."""
        call, copies = self.first[i], len(ranks)
        assert call is not None
        alters = self.once[i] and call.input is not None
        before = {c: partial(repeated, known[c], copies, self.samples) for c in finished(self.calls, call.start)}
        wanted = [c for c in self.tail if c not in before]
        _, outputs = self._play(
            repeated(dict(self.batch), copies, self.samples),
            others=others,
            gates={i: self._gates(i, ranks, 0 if alters else others, 1 - 2 * others if alters else 1 - others)},
            known=before,
            answers=self._answers(i, call, known, copies) if alters else None,
            collect=wanted,
            until=self.last,
        )
        return [self._rest(known, outputs, k, copies) for k in range(copies)]

    def _gates(self, i: int, ranks: Sequence[int], others: float, own: float) -> Tensor:
        """(samples of all copies, r), or (r,) for one copy: `own` for the copy's rank and `others` for the rest."""
        size = self.layers[i].tensors(self.adapter).size
        gates = torch.full((len(ranks), size.r), float(others))
        gates[range(len(ranks)), list(ranks)] = own
        gates = gates.to(_device(self.layers[i], self.adapter))
        return gates[0] if len(ranks) == 1 else gates.repeat_interleave(self.samples, 0)

    def _answers(self, i: int, call: Call, known: Mapping[Call, Any], copies: int) -> dict[Call, Answer]:
        """The layer gives its known output and what its gates change; what reads the same input gives its known one."""
        layer, seen = self.layers[i], []

        def changed(_: Any, args: tuple[Any, ...], __: Any) -> Tensor:
            seen[:] = [(args[0], args[0]._version)]
            result = repeated(known[call], copies, self.samples)
            return layer._add(self.adapter, layer.factors(self.adapter), result, args[0]).to(result.dtype)

        def same(other: Call, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args and args[0] is seen[0][0] and args[0]._version == seen[0][1]:
                return repeated(known[other], copies, self.samples)
            return forward(*args, **kwargs)

        alike = (c for c in known if c.start > call.end and c.input == call.input and c not in self.callers)
        return {call: changed} | {c: partial(same, c) for c in alike}

    def _rest(self, known: Mapping[Call, Any], outputs: Mapping[Call, Any], k: int, copies: int) -> float:
        """The score of copy k from the outputs of all adapted blocks."""
        found = {
            c: partial(row_block, outputs[c], k, copies, self.samples) if c in outputs else partial(known.get, c)
            for c in self.tail
        }
        return _worst(-play(self.model, self.batch, self.calls, known=found)[0])


def blocks_of(model: nn.Module, layers: Sequence[AdapterLayer]) -> set[nn.Module]:
    """The outermost repeated blocks that hold adapted layers: the children of `ModuleList`s and `Sequential`s."""
    adapted: set[nn.Module] = set(layers)
    found: set[nn.Module] = set()

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and not adapted.isdisjoint(child.modules()):
                found.update(child)
            elif not isinstance(child, AdapterLayer):
                search(child)

    search(model)
    return found
