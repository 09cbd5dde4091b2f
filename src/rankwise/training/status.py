"""What an adapter's training has come to, and ending it early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.lookup import adapted_layers, factors, ranks, reduced
from rankwise.adapters.progress import SOURCES, final_ranks_due
from rankwise.adapters.roster import Roster
from rankwise.training.session import session_of
from rankwise.update import Factors


@dataclass(frozen=True)
class Parameters:
    """Numbers in an adapter's tensors, task head left out."""

    initial: int
    """What trains at the start."""
    final: int
    """The part of it that belongs to ranks the method has not pruned."""
    exported: int
    """What a plain LoRA of the same update holds, zero ranks left out."""


@dataclass(frozen=True)
class Status:
    """Where an adapter's run stands; all of it is known without running the model."""

    method: str
    step: int
    """Attempted optimiser steps."""
    total_step: int | None
    """Steps of the whole run; None until somebody told."""
    total_step_source: str | None
    """"config" or "trainer"."""
    ranks: dict[str, int]
    """How many ranks of each module the method has not pruned."""
    exported_ranks: dict[str, int]
    """How many ranks of each module a plain LoRA of the same update needs: fewer for Deep LoRA, which prunes none."""
    final_ranks_due: int | None
    """The step at which the ranks become final; None for a method without a schedule, or once they are final."""
    rules_run: int
    """Steps at which the method's rules ran."""
    steps_skipped: int
    """Overflows and bad gradients."""
    last_penalty: float | None
    """The penalty's value at the last step of this process."""
    parameters: Parameters


def status(model: nn.Module, adapter: str = "default") -> Status:
    """Where an adapter's run stands.

    Raises:
        ArgumentError: the model has no such adapter.

    Example:
        >>> import torch, rankwise
        >>> from peft import get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5))
        >>> model = get_peft_model(net, rankwise.LoraConfig(r=2, target_modules=["0"]))
        >>> rankwise.status(model).parameters
        Parameters(initial=22, final=22, exported=0)
    """
    layers = adapted_layers(model, adapter)
    roster = next(iter(layers.values())).rosters[adapter]
    session = session_of(roster)
    progress = session.progress()
    total = progress.total or getattr(roster.method, "total_step", None)
    held = reduced(factors(model, adapter), roster.method)
    return Status(
        method=roster.method.method,
        step=progress.step,
        total_step=total,
        total_step_source=SOURCES[progress.source] or ("config" if total else None),
        ranks=ranks(model, adapter),
        exported_ranks={name: update.r for name, update in held.items()},
        final_ranks_due=final_ranks_due(roster.method, progress),
        rules_run=progress.rules,
        steps_skipped=progress.skipped,
        last_penalty=None if session.last_penalty is None else float(session.last_penalty),
        parameters=_parameters(layers, held, adapter),
    )


@torch.no_grad()
def finalize(model: nn.Module, adapter: str = "default") -> None:
    """Apply the final budget now, for a run that stopped before its schedule did.

    Ranks that the schedule would still have pruned are pruned by the scores so far. Where the ranks are final already,
    the same ranks are pruned again, in case something has moved their weights since (an average over steps).

    Raises:
        ArgumentError: the model has no such adapter.
    """
    roster = next(iter(adapted_layers(model, adapter).values())).rosters[adapter]
    session_of(roster).finalize()


def metrics(roster: Roster) -> dict[str, float]:
    """Numbers for a trainer's log: mean rank, sparsity (share of ranks pruned), steps skipped, penalty, budget."""
    session, layers = session_of(roster), roster.layers
    progress = session.progress()
    kept = torch.stack([layer.kept(roster.adapter).sum() for layer in layers]).float()
    sizes = [layer.tensors(roster.adapter).size for layer in layers]
    found = {
        "rankwise/mean_rank": float(kept.mean()),
        "rankwise/sparsity": 1 - float(kept.sum()) / sum(size.r for size in sizes),
        "rankwise/steps_skipped": float(progress.skipped),
    }
    if session.last_penalty is not None:
        found["rankwise/penalty"] = float(session.last_penalty)
    budget = budget_now(roster)
    return found if budget is None else found | {"rankwise/budget": budget}


def budget_now(roster: Roster) -> float | None:
    """The ranks over all layers that the schedule allows at this step; None without a schedule or its length."""
    progress = session_of(roster).progress()
    if not progress.total:
        return None
    sizes = [layer.tensors(roster.adapter).size for layer in roster.layers]
    budget = roster.method.budget(sizes, progress.total)
    return None if budget is None else float(budget.at(progress.step))


def _parameters(layers: Mapping[str, AdapterLayer], held: Mapping[str, Factors], adapter: str) -> Parameters:
    """Numbers of all layers.

    Args:
        layers: by name.
        held: each layer's update without ranks that hold nothing.
        adapter: its name.
    """
    initial = final = exported = 0
    for name, layer in layers.items():
        tensors = layer.started(adapter)
        numbers = sum(p.numel() for p in tensors.parameters())
        kept = layer.kept(adapter)
        initial += numbers * tensors.size.started // tensors.size.r
        final += numbers * int(kept.sum()) // kept.numel()
        exported += held[name].r * (layer.in_features + layer.out_features)
    return Parameters(initial, final, exported)
