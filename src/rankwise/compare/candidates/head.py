"""The floor of a comparison: the task head alone, on the frozen model.

A method that does not score above it has added nothing to the pretrained model.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from rankwise.compare.candidates.base import Candidate
from rankwise.compare.spec import HEAD, Entry, Spec
from rankwise.errors import ArgumentError


class HeadCandidate(Candidate):
    """Everything frozen but the modules that every other candidate trains in full.

    Args:
        rate: the head's learning rate, which is the only one there is.
        modules: the names of the modules that make the head.
    """

    has_own_rate = False
    keeps_checkpoints = False  # the Trainer would write the whole frozen model each time

    def __init__(self, rate: float, modules: tuple[str, ...]) -> None:
        self.name = HEAD
        self.suggested_rate = rate
        self.modules = modules
        self.starting_scale = None
        self.fields = {}

    @classmethod
    def of(cls, spec: Spec, entry: Entry) -> HeadCandidate:
        """The candidate of a SPEC's entry.

        Raises:
            ArgumentError: the entry has fields or a learning rate of its own.
        """
        for name, value in entry.fields.items():
            raise ArgumentError(f"{HEAD}.{name}", "be left out: the head alone has no fields", value)
        if entry.learning_rate is not None:
            rule = "be left out: the head's rate is training.head_learning_rate, the same for all methods"
            raise ArgumentError(f"{HEAD}.learning_rate", rule, entry.learning_rate)
        if not spec.task.head_modules:
            raise ArgumentError("methods", f"be methods for a task without a head, as {spec.task.type} is", HEAD)
        return cls(spec.training.head_learning_rate, spec.task.head_modules)

    def check(self, model: PreTrainedModel, steps: int) -> None:
        """Nothing more: the task has refused a model without a head."""

    def attach(self, model: PreTrainedModel, steps: int) -> nn.Module:
        """The model with its head alone set to train."""
        model.requires_grad_(False)
        for parameter in self._head(model):
            parameter.requires_grad_(True)
        return model

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """None: all that trains is the head."""
        return []

    def _head(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters of the modules that are trained in full."""
        modules = [module for name, module in model.named_modules() if name.rpartition(".")[2] in self.modules]
        return [parameter for module in modules for parameter in module.parameters()]
