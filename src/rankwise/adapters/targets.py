"""Targets that an adapter cannot have, refused by name before the model is changed.

Whether a layer's kind can be adapted at all is asked where it is wrapped (`tuner.py`). Here stand the reasons outside
of the layer: what the model does with its weight, where the weight is, what else trains it.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from rankwise.adapters.configs import AdapterConfig
from rankwise.errors import ArgumentError


def check_targets(config: AdapterConfig, model: nn.Module) -> None:
    """Raise for a targeted module that no adapter can be put on.

    Raises:
        ArgumentError: fused kernels of a Mamba model pass the module by, its weight is offloaded, or some of its rows
            are trained beside the adapter.
    """
    modules = dict(model.named_modules())
    offloads = any(_offloads(module) for module in modules.values())
    rows = _trained_in_rows(config, model, modules)
    for name in _targeted(config, model):
        _refuse_bypassed(model, name)
        weight = getattr(modules[name], "weight", None)
        if offloads and isinstance(weight, Tensor) and weight.is_meta:
            raise ArgumentError(
                "target_modules",
                'name modules whose weights are loaded (no "cpu" or "disk" in the device map of the base model)',
                f"{name}, offloaded by accelerate",
            )
        if name in rows:
            raise ArgumentError(
                "trainable_token_indices", "name embeddings that target_modules does not name, too", name
            )


def _targeted(config: AdapterConfig, model: nn.Module) -> list[str]:
    """The names of the modules that PEFT will find for a config; asked of a copy, since PEFT writes them into it."""
    resolved = _maybe_include_all_linear_layers(copy.copy(config), model)
    names = [name for name, _ in model.named_modules() if name]
    return [name for name in names if check_target_module_exists(resolved, name)]


def _refuse_bypassed(model: nn.Module, name: str) -> None:
    """PEFT's own guard, which knows the types of its own configs only: it is asked as for a plain LoRA."""
    own = name.rpartition(".")[2]
    try:
        BaseTuner._check_target_module_compatiblity(None, peft.LoraConfig(), model, own)  # type: ignore[arg-type]
    except ValueError as error:
        raise ArgumentError(
            "target_modules",
            "leave out the modules that the fused kernels of Mamba models pass by, as PEFT's LoRA does (pass "
            f"exclude_modules=[{own!r}])",
            name,
        ) from error


def _offloads(module: nn.Module) -> bool:
    """Whether accelerate moves the module's weights in for each forward pass, and out again."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload", False) for part in (hook, *getattr(hook, "hooks", ())))


def _trained_in_rows(config: AdapterConfig, model: Any, modules: dict[str, nn.Module]) -> set[str]:
    """The modules of which PEFT trains single rows: those that a mapping names, or the input embedding for a list."""
    indices = config.trainable_token_indices
    if not indices:
        return set()
    if isinstance(indices, dict):
        return {name for name in modules for own in indices if f".{name}".endswith(f".{own}")}
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return {name for name, module in modules.items() if module is embedding}
