"""The questions a comparison asks of everything that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel, TrainerCallback


@dataclass(frozen=True)
class Measured:
    """What a trained candidate came to. A candidate without ranks leaves everything about ranks empty."""

    parameters: dict[str, int]
    """Trained numbers beside the head: `initial`, `final` (what was not pruned) and `exported` (as a plain LoRA)."""
    ranks: dict[str, int] = field(default_factory=dict)
    """The rank that was kept, by module."""
    exported_ranks: dict[str, int] = field(default_factory=dict)
    """The rank that a plain LoRA of the same update needs, by module."""
    singular_values: dict[str, list[float]] = field(default_factory=dict)
    """All singular values of each module's update, largest first."""
    steps_skipped: int = 0
    """Optimiser steps that moved nothing, because of an overflow or of gradients that were not finite."""


class Batches(Protocol):
    """What gives the batches of one pass over the training data, as a DataLoader does."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __len__(self) -> int: ...


class Candidate(ABC):
    """One way to train a model: what is attached to it, what it costs, and what it leaves behind."""

    name: str
    """The method's name in the SPEC and in results."""
    suggested_rate: float
    """Peak learning rate where the SPEC gives none."""
    has_own_rate: bool = True
    """Whether the SPEC's `learning_rate` is for this candidate; the head alone has the head's rate only."""
    trains: bool = True
    """Whether there is anything to train; the pretrained model as it is has nothing."""
    keeps_checkpoints: bool = True
    """Whether a run writes checkpoints to go on from: small ones, of what trains alone."""
    starting_scale: float | None
    """What the update is multiplied by at the start, lora_alpha / r; None where there is no such scale."""
    fields: dict[str, Any]
    """Hyper-parameters with their resolved values."""

    @abstractmethod
    def check(self, model: PreTrainedModel, steps: int) -> None:
        """Refuse what cannot work, before any weight is loaded.

        Args:
            model: the model without weights, on the meta device.
            steps: optimiser steps of the run.

        Raises:
            ArgumentError: naming the field, its rule and the value.
        """

    def settled_from(self, steps: int) -> int:
        """The first step whose weights may be scored in the place of the last ones; the very first, for most.

        An adaptive method holds more ranks than its budget until its schedule has ended.
        """
        return 0

    @abstractmethod
    def attach(self, model: PreTrainedModel, steps: int) -> nn.Module:
        """The model with everything that this candidate trains set to require gradients, and nothing else."""

    def start(self, model: nn.Module, batches: Callable[[], Batches]) -> None:
        """Whatever has to see training examples before the optimiser is made; for most candidates, nothing.

        Args:
            model: what `attach` has made, where it will train.
            batches: gives the batches of one pass over the training data.
        """
        return

    def callbacks(self) -> list[TrainerCallback]:
        """What the trainer has to call for this candidate."""
        return []

    @abstractmethod
    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """What trains at the candidate's own learning rate; everything else that trains takes the head's rate."""

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The rank of each adapted module now; none for a candidate without an adapter."""
        return {}

    def finish(self, model: nn.Module, output: Path, key: str, command: str) -> nn.Module:
        """The model that is scored and measured, made from the trained one; most candidates change nothing.

        Args:
            model: the trained model.
            output: the output folder of the comparison.
            key: the name of the run's folders.
            command: what the user typed.
        """
        return model

    def measure(self, model: nn.Module) -> Measured:
        """Sizes, ranks and spectra of the trained model; of a candidate without ranks, how many numbers it trains."""
        count = sum(p.numel() for p in self.own_parameters(model))
        return Measured(parameters={"initial": count, "final": count, "exported": count})

    def save(self, model: nn.Module, output: Path, key: str, command: str) -> str | None:
        """Write what the run leaves behind under `output`, in folders named `key`; by default nothing.

        Returns:
            The folder of the plain LoRA, relative to `output`; None where there is nothing to export.
        """
        return None
