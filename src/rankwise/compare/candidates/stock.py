"""Any config class of stock PEFT by its name: a baseline through the code that its users run."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import NoMatchingPeftModuleError, PeftConfig, PromptLearningConfig, get_peft_model
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from rankwise.compare.candidates.base import Batches, Candidate, Measured
from rankwise.compare.candidates.eva import EVA, start_from_batches
from rankwise.compare.models import quantised_layer
from rankwise.compare.spec import Entry, Spec
from rankwise.errors import ArgumentError, nearest
from rankwise.files import whole_folder
from rankwise.methods import METHODS
from rankwise.update import Factors

VARIANTS = {
    "dora": "use_dora = true",
    "rslora": "use_rslora = true",
    "pissa": 'init_lora_weights = "pissa"',
    "olora": 'init_lora_weights = "olora"',
    EVA: 'init_lora_weights = "eva"',
}
"""Methods that are PEFT's LoRA with one field set, as people call them."""
PREFIX = "peft."
"""What the names of PEFT's config classes begin with in a SPEC, as `peft.LoraConfig`."""
CONFIGS: dict[str, type[PeftConfig]] = {
    name: kind
    for name, kind in vars(peft).items()
    if inspect.isclass(kind) and issubclass(kind, PeftConfig) and name.endswith("Config")
    # What others are derived from makes no adapter.
    if kind not in (PeftConfig, PromptLearningConfig)
}
"""Every config class of the installed PEFT."""
OF_PEFT = {field.name for field in dataclasses.fields(PeftConfig)}
"""What every config holds about the adapter's file and its use, which is not a SPEC's to say."""
UNFIT = (NoMatchingPeftModuleError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)
"""What PEFT raises, in one place or another, for a config that does not fit the model."""
WHERE = {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "task_type"}
"""Fields of configs that say which modules train."""
PROBE = "probe"
"""The name of the layer that a config is tried on."""
WITHOUT_RANK = (peft.OFTConfig,)
"""Kinds whose `r` counts something else, here blocks of a rotation."""
REFUSED_STARTS = ("corda", "lora_ga")
"""Values of `init_lora_weights` that do nothing unless a function of the user's is given to PEFT before training."""


class StockCandidate(Candidate):
    """A config of stock PEFT with its fields, trained as PEFT's own examples train it.

    Args:
        name: the class's name as in the SPEC.
        kind: the class.
        given: every field that is set, by the SPEC's entry or because all candidates share it.
        fields: those that the entry sets.
        quantise: how many bits the SPEC holds frozen weights in, "4bit" or "8bit"; None for all of them.
    """

    def __init__(
        self,
        name: str,
        kind: type[PeftConfig],
        given: dict[str, Any],
        fields: dict[str, Any],
        quantise: str | None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.given = given
        self.fields = fields
        self.quantise = quantise
        self.suggested_rate = METHODS["lora"].suggested_rate
        self.starting_scale = None
        alpha, r = given.get("lora_alpha"), given.get("init_r", given.get("r"))
        if isinstance(alpha, int | float) and isinstance(r, int | float) and r:
            self.starting_scale = alpha / (r**0.5 if given.get("use_rslora") else r)

    @classmethod
    def of(cls, spec: Spec, entry: Entry) -> StockCandidate:
        """The candidate of a SPEC's entry.

        Where the class has the fields, r is the budget's and lora_alpha is r, so that the scale is that of our methods.
        AdaLoRA goes from 1.5·r to r, as ours does.

        Raises:
            ArgumentError: PEFT has no such class, or it has no such field.
        """
        class_name = entry.name.removeprefix(PREFIX)
        if class_name not in CONFIGS:
            raise ArgumentError("methods", f"name a config class of PEFT ({nearest(class_name, CONFIGS)})", entry.name)
        kind = CONFIGS[class_name]
        known = {field.name for field in dataclasses.fields(kind)}
        for name, value in entry.fields.items():
            if name not in known - OF_PEFT:
                rule = f"be a field of PEFT's class ({nearest(name, known)})"
                raise ArgumentError(f"{entry.name}.{name}", rule, value)
        if entry.fields.get("init_lora_weights") in REFUSED_STARTS:
            rule = f"be a start that needs no function of yours ({', '.join(REFUSED_STARTS)} do)"
            raise ArgumentError(f"{entry.name}.init_lora_weights", rule, entry.fields["init_lora_weights"])
        if issubclass(kind, PromptLearningConfig) and not spec.task.head_modules:
            rule = "be a config that adds no tokens, since the model's answers are scored token by token"
            raise ArgumentError("methods", rule, entry.name)
        targets = spec.task.target_modules
        shared: dict[str, Any] = {
            "target_modules": targets if isinstance(targets, str) else list(targets),
        }
        if issubclass(kind, peft.AdaLoraConfig):
            target_r = entry.fields.get("target_r", spec.budget.r)
            start_r = entry.fields.get("init_r", math.ceil(1.5 * target_r))
            shared |= {"target_r": target_r, "init_r": start_r, "lora_alpha": start_r}
        elif not issubclass(kind, WITHOUT_RANK):
            shared |= {"r": spec.budget.r, "lora_alpha": entry.fields.get("r", spec.budget.r)}
        of_task = spec.task.adapter_fields(entry.fields.get("modules_to_save") or ())
        given = {name: value for name, value in (shared | of_task).items() if name in known} | entry.fields
        if "modules_to_save" in of_task:
            given["modules_to_save"] = of_task["modules_to_save"]
        return cls(entry.name, kind, given, entry.fields, spec.training.quantise)

    def check(self, model: PreTrainedModel, steps: int) -> None:
        """Refuse values that PEFT does not accept, module names that match nothing, and a schedule of another length.

        Raises:
            ArgumentError: naming the field, its rule and the value.
        """
        told = self.given.get("total_step")
        if told not in (None, steps):
            raise ArgumentError(f"{self.name}.total_step", f"be left out, or be the steps of the run, {steps}", told)
        try:
            adapted = get_peft_model(model, self.config(steps), low_cpu_mem_usage=True)
        except UNFIT as error:
            raise ArgumentError(
                self.name, f"be a config that fits the model ({_reason(error)})", self.fields
            ) from error
        if self.quantise is not None:
            self._check_quantised(adapted, steps, self.quantise)

    def _check_quantised(self, adapted: nn.Module, steps: int, quantise: str) -> None:
        """Refuse a config that cannot train beside quantised weights, by a trial on one layer of the model's shape.

        The skeleton cannot tell, since its weights are neither there nor quantised.
        """
        modules = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
        layers = [layer for layer in (module.get_base_layer() for module in modules) if isinstance(layer, nn.Linear)]
        if not layers:
            return
        inputs, outputs = layers[0].in_features, layers[0].out_features
        alone = nn.ModuleDict({PROBE: quantised_layer(inputs, outputs, quantise)})
        try:
            get_peft_model(alone, self.config(steps, only=PROBE))  # type: ignore[arg-type]
            tried = alone[PROBE](torch.zeros(1, inputs))
            tried.sum().backward()
        except (*UNFIT, RuntimeError) as error:
            rule = f"be a config that works on weights in {quantise}, as training.quantise asks ({_reason(error)})"
            raise ArgumentError(self.name, rule, self.fields) from error

    def config(self, steps: int, only: str | None = None) -> PeftConfig:
        """The config; PEFT's AdaLoRA is told the length of the run, without which it refuses to be made.

        Args:
            steps: optimiser steps of the run.
            only: the name of the one module to adapt, instead of those that the SPEC names.
        """
        needs_length = "total_step" in {field.name for field in dataclasses.fields(self.kind)}
        length: dict[str, Any] = {"total_step": steps} if needs_length else {}
        given: dict[str, Any] = length | self.given
        if isinstance(given.get("eva_config"), dict):  # a table in the SPEC, a class in PEFT
            given["eva_config"] = peft.EvaConfig(**given["eva_config"])
        if only is not None:
            given = {name: value for name, value in given.items() if name not in WHERE} | {"target_modules": [only]}
        return self.kind(**given)

    def settled_from(self, steps: int) -> int:
        """The last allocation of PEFT's AdaLoRA; other kinds keep their size."""
        config = self.config(steps)
        return steps - config.tfinal if isinstance(config, peft.AdaLoraConfig) else 0

    def attach(self, model: PreTrainedModel, steps: int) -> nn.Module:
        """The model with the adapter in it."""
        return get_peft_model(model, self.config(steps))

    def start(self, model: Any, batches: Callable[[], Batches]) -> None:
        """EVA's start, where the config asks for it."""
        if self.given.get("init_lora_weights") == EVA:
            start_from_batches(model, batches())

    def callbacks(self) -> list[TrainerCallback]:
        """The call that PEFT's AdaLoRA asks its users to make after every optimiser step."""
        return [_Allocation()] if issubclass(self.kind, peft.AdaLoraConfig) else []

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Everything that trains but the modules that PEFT trains in full beside the adapter."""
        return [p for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in name]

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The rank of each module under LoRA and AdaLoRA; PEFT's other kinds have no common name for ranks."""
        if issubclass(self.kind, peft.AdaLoraConfig):
            values = {name: layer.lora_E["default"] for name, layer in self._triplets(model).items()}
            kept = {name: int(each.count_nonzero()) for name, each in values.items()}
            # All of them start at 0, and a pruned one is put back there.
            return kept if any(kept.values()) else {name: len(each) for name, each in values.items()}
        return {name: update.r for name, update in self._updates(model).items()}

    def measure(self, model: nn.Module) -> Measured:
        """How many numbers the adapter trains and keeps; of LoRA and AdaLoRA ranks and spectra, too.

        Every kind saves what it trains, but for AdaLoRA, whose pruned triplets are left out, as they are of ours.
        """
        initial = sum(p.numel() for p in self.own_parameters(model))
        ranks = self.ranks(model)
        pruned, values = 0, 0
        for name, layer in self._triplets(model).items():
            per_rank = layer.in_features + layer.out_features + 1
            pruned += (len(layer.lora_E["default"]) - ranks[name]) * per_rank
            values += ranks[name]
        final = initial - pruned
        spectra = {name: update.singular_values().tolist() for name, update in self._updates(model).items()}
        return Measured(
            parameters={"initial": initial, "final": final, "exported": final - values},
            ranks=ranks,
            exported_ranks=ranks,
            singular_values=spectra,
        )

    def _triplets(self, model: nn.Module) -> dict[str, Any]:
        """The adapted layers of PEFT's AdaLoRA, by module name in the base model."""
        modules: Any = model.named_modules()
        if not issubclass(self.kind, peft.AdaLoraConfig):
            return {}
        return {
            name.removeprefix("base_model.model."): module
            for name, module in modules
            if isinstance(module, AdaLoraLayer)
        }

    def _updates(self, model: nn.Module) -> dict[str, Factors]:
        """ΔW of every module under plain LoRA, scaling · B·A, or AdaLoRA, by module name in the base model."""
        if issubclass(self.kind, peft.AdaLoraConfig):
            return {name: _of_triplets(layer) for name, layer in self._triplets(model).items()}
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


def _reason(error: Exception) -> str:
    """The first line of what a library complains of, as a part of a sentence."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _of_triplets(layer: Any) -> Factors:
    """ΔW = scaling / r · B·diag(E)·A of a layer under PEFT's AdaLoRA, as its forward pass has it."""
    A, E, B = (part["default"].detach() for part in (layer.lora_A, layer.lora_E, layer.lora_B))
    scaling = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
    return Factors(B, E.flatten() * scaling, A)


class _Allocation(TrainerCallback):
    """`update_and_allocate` after every optimiser step, while the gradients are still there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)
