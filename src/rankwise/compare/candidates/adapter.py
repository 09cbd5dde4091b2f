"""A method of rankwise as a candidate: an adapter beside the frozen model, and a plain LoRA at the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peft import NoMatchingPeftModuleError, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from rankwise.adapters.configs import CONFIGS, AdapterConfig
from rankwise.adapters.lookup import adapted_layers, factors, ranks
from rankwise.compare.candidates.base import Candidate, Measured
from rankwise.compare.spec import Entry, Spec
from rankwise.errors import ArgumentError, nearest
from rankwise.export.adapter import check_config
from rankwise.export.lora import export_lora
from rankwise.export.reader import COMMAND
from rankwise.files import whole_folder
from rankwise.methods import METHODS
from rankwise.training.status import status


class AdapterCandidate(Candidate):
    """One config class of rankwise with its fields.

    Args:
        config: the adapter's config.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.name = config.method
        self.suggested_rate = config.suggest_rate()
        self.starting_scale = config.scale_of("")
        own_fields = dataclasses.fields(METHODS[config.method])
        self.fields = {field.name: getattr(config, field.name) for field in own_fields}

    @classmethod
    def of(cls, spec: Spec, entry: Entry) -> AdapterCandidate:
        """The candidate of a SPEC's entry, whose fields are checked.

        Raises:
            ArgumentError: the method has no such field, or a value breaks its rule.
        """
        set_by_peft = {field.name for field in dataclasses.fields(PeftConfig)} | {"rankwise_format"}
        config_fields = dataclasses.fields(CONFIGS[entry.name])
        known = [field.name for field in config_fields if field.name not in set_by_peft]
        for name, value in entry.fields.items():
            if name not in known:
                raise ArgumentError(f"{entry.name}.{name}", f"be a field of the method ({nearest(name, known)})", value)
        targets = spec.task.target_modules
        shared = {"r": spec.budget.r, "target_modules": targets if isinstance(targets, str) else list(targets)}
        of_task = spec.task.adapter_fields(entry.fields.get("modules_to_save") or ())
        given: dict[str, Any] = shared | entry.fields | of_task
        config = CONFIGS[entry.name](**given)  # type: ignore[arg-type]
        check_config(vars(config), "the adapter")
        return cls(config)

    def check(self, model: PreTrainedModel, steps: int) -> None:
        """Refuse schedules that do not fit the run, and module names that match nothing.

        Raises:
            ArgumentError: naming the field, its rule and the value.
        """
        # Candidates have equal budgets only if every schedule ends with the run.
        told = getattr(self.config, "total_step", None)
        if told not in (None, steps):
            raise ArgumentError(f"{self.name}.total_step", f"be left out, or be the steps of the run, {steps}", told)
        self.config.final_step(steps)
        try:
            get_peft_model(model, self.config, low_cpu_mem_usage=True)
        except NoMatchingPeftModuleError as error:
            asked = {
                "target_modules": self.config.target_modules,
                "layers_to_transform": self.config.layers_to_transform,
            }
            rule = "match modules together with exclude_modules and layers"
            raise ArgumentError("target_modules", rule, asked) from error

    def settled_from(self, steps: int) -> int:
        """The step from which the ranks that the method keeps no longer change."""
        return self.config.final_step(steps) or 0

    def attach(self, model: PreTrainedModel, steps: int) -> nn.Module:
        """The model with the adapter in it."""
        return get_peft_model(model, self.config)

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The adapter's parameters, without the head."""
        layers = adapted_layers(model).values()
        return [p for layer in layers for p in layer.tensors("default").trained()]

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The rank of each adapted module now."""
        return ranks(model)

    def measure(self, model: nn.Module) -> Measured:
        """Sizes, ranks and spectra of the trained adapter."""
        now = status(model)
        return Measured(
            parameters=dataclasses.asdict(now.parameters),
            ranks=now.ranks,
            exported_ranks=now.exported_ranks,
            singular_values={name: update.singular_values().tolist() for name, update in factors(model).items()},
            steps_skipped=now.steps_skipped,
        )

    def save_adapter(self, model: Any, output: Path, key: str, command: str) -> None:
        """Write the adapter as PEFT saves it, with the command that made it."""
        with whole_folder(output / "adapters" / key) as folder:
            model.save_pretrained(str(folder))
            (folder / COMMAND).write_text(command + "\n", encoding="utf-8")

    def save(self, model: Any, output: Path, key: str, command: str) -> str:
        """Write the adapter, to train on, and its plain LoRA, to serve."""
        self.save_adapter(model, output, key, command)
        export_lora(model, output / "exports" / key, command=command, overwrite=True)
        return str(Path("exports") / key)
