"""The floor of a task without a head: the pretrained model as it is."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from rankwise.compare.candidates.base import Candidate
from rankwise.compare.spec import PRETRAINED, Entry, Spec
from rankwise.errors import ArgumentError


class PretrainedCandidate(Candidate):
    """Nothing is trained; the model is scored as it was opened."""

    has_own_rate = False
    trains = False
    keeps_checkpoints = False

    def __init__(self) -> None:
        self.name = PRETRAINED
        self.suggested_rate = 0.0
        self.starting_scale = None
        self.fields = {}

    @classmethod
    def of(cls, spec: Spec, entry: Entry) -> PretrainedCandidate:
        """The candidate of a SPEC's entry.

        Raises:
            ArgumentError: the entry has fields or a learning rate, or the task has a head, which is random as it is.
        """
        for name, value in entry.fields.items():
            raise ArgumentError(f"{PRETRAINED}.{name}", "be left out: nothing is trained", value)
        if entry.learning_rate is not None:
            raise ArgumentError(f"{PRETRAINED}.learning_rate", "be left out: nothing is trained", entry.learning_rate)
        if spec.task.head_modules:
            rule = f"be a method that trains the head, since {spec.task.type} starts with a random one"
            raise ArgumentError("methods", rule, PRETRAINED)
        return cls()

    def check(self, model: PreTrainedModel, steps: int) -> None:
        """Nothing can go wrong."""

    def attach(self, model: PreTrainedModel, steps: int) -> nn.Module:
        """The model, frozen."""
        return model.requires_grad_(False)

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """None."""
        return []
