"""Scores of ranks on a development batch: the user's own, or a trainer's data, on every process that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapters.layer import AdapterLayer, NotPerSampleError
from rankwise.adapters.peers import mean_by
from rankwise.adapters.roster import Roster
from rankwise.errors import ArgumentError
from rankwise.training.aside import Batch, evaluation, gathered, loss_of, model_of, on_device_of
from rankwise.training.nested import samples_of
from rankwise.training.scoring import Replay, Scores, one_by_one


def can_ablate(roster: Roster) -> bool:
    """Whether there is a model and data to score it on."""
    given = getattr(roster.method, "score_batch", None) is not None
    return roster.model is not None and (given or roster.development is not None)


def check(roster: Roster) -> None:
    """Run the model once on the development batch, as rounds will, so that what cannot be scored is found at once.

    Raises:
        ArgumentError: the batch holds no inputs of the model, or its output has no loss.
    """
    model, given = model_of(roster), getattr(roster.method, "score_batch", None)
    if not callable(given):
        with evaluation(model), gathered(model):
            batch = given if given is not None else roster.development()[0]  # type: ignore[misc]  see can_ablate
            loss_of(model, on_device_of(model, _inputs(batch)))


def ablate(roster: Roster) -> Scores:
    """Score every rank in use on the development batch, in evaluation mode."""
    model, layers, adapter = model_of(roster), roster.layers, roster.adapter
    given: Any = getattr(roster.method, "score_batch", None)
    with evaluation(model), gathered(model):
        kept = [layer.kept(adapter) for layer in layers]
        if callable(given):
            scores = one_by_one(partial(_number, given, model), layers, adapter, kept)
            return _agreed(scores, 1, roster.peers, kept[0].device)
        batches = [given] if given is not None else roster.development()  # type: ignore[misc]  see can_ablate
        batches = [on_device_of(model, _inputs(batch)) for batch in batches]
        found = [_of_batch(model, batch, layers, adapter, kept, replay=not roster.sharded) for batch in batches]
        samples = [samples_of(batch) for batch in batches]
        return _agreed(_mean(found, samples), sum(samples), roster.peers, kept[0].device)


def _inputs(batch: Any) -> Batch:
    """A development batch, if it is one."""
    if not isinstance(batch, Mapping):
        raise ArgumentError("score_batch", "be given: the trainer's batches are no inputs of the model", type(batch))
    return batch


def _of_batch(
    model: nn.Module,
    batch: Batch,
    layers: Sequence[AdapterLayer],
    adapter: str,
    kept: Sequence[Tensor],
    *,
    replay: bool,
) -> Scores:
    """By modules that are replayed, or by whole passes alone, in which FSDP2 gathers what it has sharded."""
    recorded = Replay(model, batch, layers, adapter) if replay else None
    if recorded is not None and recorded.replayable:
        try:
            return recorded.scores(kept)
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


def _agreed(scores: Scores, samples: int, peers: Any, device: torch.device) -> Scores:
    """The mean over processes, each of which may have scored samples of its own: all must move the same ranks."""
    flat = torch.cat([torch.tensor([scores.whole], dtype=torch.float32), *scores.without, *scores.alone])
    whole, *parts = (
        mean_by(flat.to(device), samples, peers)
        .to(flat.device)
        .split([1, *(len(t) for t in (*scores.without, *scores.alone))])
    )
    return Scores(float(whole), parts[: len(scores.without)], parts[len(scores.without) :])
