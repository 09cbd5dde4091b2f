"""Fine-tuning of the weights themselves, all of them or those of some modules: the ceiling of a comparison.

A run leaves its result alone: a whole model for every seed would fill the disk.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from rankwise.compare.candidates.base import Candidate
from rankwise.compare.spec import CEILING, Entry, Spec
from rankwise.errors import ArgumentError, nearest

FULL = CEILING
PARTIAL = "partial"
FINE_TUNING_RATE = 5e-5
"""The Trainer's own default."""


class FineTuningCandidate(Candidate):
    """The weights themselves: all of them, or those of the modules that are named.

    Args:
        name: `full` or `partial`.
        modules: the ends of module names; None for every module.
        head_modules: the modules that make the head, which trains at its own rate.
    """

    keeps_checkpoints = False  # the Trainer would write the whole model each time

    def __init__(self, name: str, modules: tuple[str, ...] | None, head_modules: tuple[str, ...]) -> None:
        self.name = name
        self.modules = modules
        self.head_modules = head_modules
        self.suggested_rate = FINE_TUNING_RATE
        self.starting_scale = None
        self.fields = {} if modules is None else {"modules": list(modules)}

    @classmethod
    def of(cls, spec: Spec, entry: Entry) -> FineTuningCandidate:
        """The candidate of a SPEC's entry.

        Raises:
            ArgumentError: `partial` names no modules, there is another field, or the weights are quantised.
        """
        if spec.training.quantise is not None:
            rule = f"be left out for {entry.name}: quantised weights cannot be trained"
            raise ArgumentError("training.quantise", rule, spec.training.quantise)
        known = ["modules"] if entry.name == PARTIAL else []
        for name, value in entry.fields.items():
            if name not in known:
                rule = f"be `modules`, {PARTIAL}'s only field" if known else f"be left out: {FULL} has no fields"
                raise ArgumentError(f"{entry.name}.{name}", rule, value)
        if entry.name == FULL:
            return cls(FULL, None, spec.task.head_modules)
        modules = entry.fields.get("modules")
        if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
            raise ArgumentError(f"{PARTIAL}.modules", "be a list of module names", modules)
        return cls(PARTIAL, tuple(modules), spec.task.head_modules)

    def check(self, model: PreTrainedModel, steps: int) -> None:
        """Refuse module names that match nothing, or nothing that can train.

        Raises:
            ArgumentError: a name is the end of no module's name, or only of modules without weights.
        """
        modules = dict(model.named_modules())
        for wanted in self.modules or ():
            named = [module for name, module in modules.items() if _ends(name, wanted)]
            if not named:
                own = {name.rpartition(".")[2] for name in modules}
                raise ArgumentError(f"{PARTIAL}.modules", f"match modules ({nearest(wanted, own)})", wanted)
            if not any(True for module in named for _ in module.parameters()):
                raise ArgumentError(f"{PARTIAL}.modules", "match modules that have weights to train", wanted)

    def attach(self, model: PreTrainedModel, steps: int) -> nn.Module:
        """The model with the chosen weights set to train."""
        for module_name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(self._trains(module_name) or self._in_head(module_name))
        return model

    def _trains(self, name: str) -> bool:
        return self.modules is None or any(_within(name, wanted) for wanted in self.modules)

    def _in_head(self, name: str) -> bool:
        return any(_within(name, wanted) for wanted in self.head_modules)

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """What trains outside the head."""
        found: dict[int, nn.Parameter] = {}
        for module_name, module in model.named_modules():
            if not self._in_head(module_name):
                found |= {id(p): p for p in module.parameters(recurse=False) if p.requires_grad}
        return list(found.values())


def _ends(name: str, wanted: str) -> bool:
    """Whether a module's name is `wanted`, or ends in it after a dot."""
    return name == wanted or name.endswith(f".{wanted}")


def _within(name: str, wanted: str) -> bool:
    """Whether a module is one that `wanted` names, or lies in one."""
    return f".{wanted}." in f".{name}."
