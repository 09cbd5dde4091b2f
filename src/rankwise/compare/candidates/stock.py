"""Any config class of stock PEFT by its name: a baseline through the code that its users run."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import peft
import torch
from peft import NoMatchingPeftModuleError, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from rankwise.compare.candidates.base import Candidate, Measured
from rankwise.compare.spec import Entry, Spec
from rankwise.errors import ArgumentError, nearest
from rankwise.files import whole_folder
from rankwise.methods import METHODS
from rankwise.update import Factors

PREFIX = "peft."
"""What the names of PEFT's config classes begin with in a SPEC, as `peft.LoraConfig`."""
CONFIGS: dict[str, type[PeftConfig]] = {
    name: kind
    for name, kind in vars(peft).items()
    if inspect.isclass(kind) and issubclass(kind, PeftConfig) and name.endswith("Config") and kind is not PeftConfig
}
"""Every config class of the installed PEFT."""


class StockCandidate(Candidate):
    """A config of stock PEFT with its fields, trained as PEFT's own examples train it.

    Args:
        name: the class's name as in the SPEC.
        kind: the class.
        given: every field that is set, by the SPEC's entry or because all candidates share it.
        fields: those that the entry sets.
    """

    def __init__(self, name: str, kind: type[PeftConfig], given: dict[str, Any], fields: dict[str, Any]) -> None:
        self.name = name
        self.kind = kind
        self.given = given
        self.fields = fields
        self.suggested_rate = METHODS["lora"].suggested_rate
        self.starting_scale = None
        alpha, r = given.get("lora_alpha"), given.get("r")
        if alpha is not None and r:
            self.starting_scale = alpha / (r**0.5 if given.get("use_rslora") else r)

    @classmethod
    def of(cls, spec: Spec, entry: Entry) -> StockCandidate:
        """The candidate of a SPEC's entry.

        Where the class has the fields, r is the budget's and lora_alpha is r, so that the scale is that of our methods.

        Raises:
            ArgumentError: PEFT has no such class, or it has no such field.
        """
        class_name = entry.name.removeprefix(PREFIX)
        if class_name not in CONFIGS:
            raise ArgumentError("methods", f"name a config class of PEFT ({nearest(class_name, CONFIGS)})", entry.name)
        kind = CONFIGS[class_name]
        known = {field.name for field in dataclasses.fields(kind)}
        for name, value in entry.fields.items():
            if name not in known:
                rule = f"be a field of PEFT's class ({nearest(name, known)})"
                raise ArgumentError(f"{entry.name}.{name}", rule, value)
        targets = spec.task.target_modules
        shared = {
            "r": spec.budget.r,
            "lora_alpha": entry.fields.get("r", spec.budget.r),
            "target_modules": targets if isinstance(targets, str) else list(targets),
        }
        of_task = spec.task.adapter_fields(entry.fields.get("modules_to_save") or ())
        given = {name: value for name, value in (shared | of_task).items() if name in known} | entry.fields
        if "modules_to_save" in of_task:
            given["modules_to_save"] = of_task["modules_to_save"]
        return cls(entry.name, kind, given, entry.fields)

    def check(self, model: PreTrainedModel, steps: int) -> None:
        """Refuse values that PEFT does not accept, module names that match nothing, and a schedule of another length.

        Raises:
            ArgumentError: naming the field, its rule and the value.
        """
        told = self.given.get("total_step")
        if told not in (None, steps):
            raise ArgumentError(f"{self.name}.total_step", f"be left out, or be the steps of the run, {steps}", told)
        try:
            get_peft_model(model, self.config(steps), low_cpu_mem_usage=True)
        except (NoMatchingPeftModuleError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ArgumentError(self.name, f"be a config that fits the model ({reason})", self.fields) from error

    def config(self, steps: int) -> PeftConfig:
        """The config; PEFT's AdaLoRA is told the length of the run, without which it refuses to be made."""
        needs_length = "total_step" in {field.name for field in dataclasses.fields(self.kind)}
        length: dict[str, Any] = {"total_step": steps} if needs_length else {}
        return self.kind(**(length | self.given))

    def settled_from(self, steps: int) -> int:
        """The last allocation of PEFT's AdaLoRA; other kinds keep their size."""
        config = self.config(steps)
        return steps - config.tfinal if isinstance(config, peft.AdaLoraConfig) else 0

    def attach(self, model: PreTrainedModel, steps: int) -> nn.Module:
        """The model with the adapter in it."""
        return get_peft_model(model, self.config(steps))

    def callbacks(self) -> list[TrainerCallback]:
        """The call that PEFT's AdaLoRA asks its users to make after every optimiser step."""
        return [_Allocation()] if issubclass(self.kind, peft.AdaLoraConfig) else []

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Everything that trains but the modules that PEFT trains in full beside the adapter."""
        return [p for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in name]

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The rank of each module under plain LoRA; PEFT's other kinds have no common name for ranks."""
        return {name: update.r for name, update in self._updates(model).items()}

    def measure(self, model: nn.Module) -> Measured:
        """How many numbers the adapter trains, which is also what it saves; of plain LoRA, ranks and spectra."""
        count = sum(p.numel() for p in self.own_parameters(model))
        updates = self._updates(model)
        return Measured(
            parameters={"initial": count, "final": count, "exported": count},
            ranks={name: update.r for name, update in updates.items()},
            exported_ranks={name: update.r for name, update in updates.items()},
            singular_values={name: update.singular_values().tolist() for name, update in updates.items()},
        )

    def _updates(self, model: nn.Module) -> dict[str, Factors]:
        """ΔW = scaling · B·A of every linear module under plain LoRA, by module name in the base model."""
        if self.kind is not peft.LoraConfig or self.given.get("use_dora"):
            return {}
        found: dict[str, Factors] = {}
        modules: Any = model.named_modules()
        for name, module in modules:
            if isinstance(module, LoraLayer) and "default" in module.lora_A:
                factors: Any = (module.lora_A["default"], module.lora_B["default"])
                A, B = (factor.weight.detach() for factor in factors)
                scaling = torch.full((A.shape[0],), float(module.scaling["default"]))
                # A convolution's factors are matrices once its kernel is laid out in a row.
                found[name.removeprefix("base_model.model.")] = Factors(B.flatten(1), scaling.to(A), A.flatten(1))
        return found

    def save(self, model: Any, output: Path, key: str, command: str) -> str | None:
        """Write the adapter as PEFT saves it; a plain LoRA is its own export."""
        with whole_folder(output / "adapters" / key) as folder:
            model.save_pretrained(str(folder))
        return str(Path("adapters") / key) if self.kind is peft.LoraConfig else None


class _Allocation(TrainerCallback):
    """`update_and_allocate` after every optimiser step, while the gradients are still there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)
