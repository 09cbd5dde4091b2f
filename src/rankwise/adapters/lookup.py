"""Reading an adapted model: its layers, their updates, their ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from rankwise.adapters.layer import AdapterLayer
from rankwise.errors import ArgumentError
from rankwise.methods.base import Method
from rankwise.update import Factors


def adapted_layers(model: nn.Module, adapter: str = "default") -> dict[str, AdapterLayer]:
    """The layers that carry `adapter`, by their names in the base model, in model order.

    Raises:
        ArgumentError: the model has no such adapter.
    """
    layers = {
        base_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and adapter in module.rankwise_tensors
    }
    if not layers:
        raise ArgumentError("adapter", f"be a rankwise adapter of the model ({_present(model)})", adapter)
    return layers


def factors(model: nn.Module, adapter: str = "default") -> dict[str, Factors]:
    """The update of every adapted module, as evaluation mode computes it now.

    Returns:
        Factors(B (out, r), s (r,), A (r, in)) by module name in the base model; ΔW = B·diag(s)·A, every scale folded
        into s.

    Raises:
        ArgumentError: the model has no such adapter.

    Example:
        >>> import torch, rankwise
        >>> from peft import get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5))
        >>> model = get_peft_model(net, rankwise.LoraConfig(r=2, target_modules=["0"]))
        >>> {name: tuple(f.delta().shape) for name, f in rankwise.factors(model).items()}
        {'0': (5, 6)}
    """
    return {
        name: Factors(*(t.detach() for t in layer.factors(adapter)))
        for name, layer in adapted_layers(model, adapter).items()
    }


def trained_factors(model: nn.Module, adapter: str = "default") -> dict[str, Factors]:
    """What training moves of every update: the update itself, or for SORSA U_p, S_p and V_p without their start.

    Raises:
        ArgumentError: the model has no such adapter.
    """
    return {
        name: Factors(*(t.detach() for t in layer.trained_factors(adapter)))
        for name, layer in adapted_layers(model, adapter).items()
    }


def ranks(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    """How many ranks of each module the method has not pruned, by module name in the base model.

    r for LoRA, NNM-LoRA, SORSA, NB-LoRA and Deep LoRA; the last allocation's kept set for AdaLoRA (init_r before the
    first); the open ranks of ALoRA; evaluation gates that are not 0 for SoRA and SaLoRA. What an export
    would hold is `status(model).parameters`.

    Raises:
        ArgumentError: the model has no such adapter.
    """
    return {name: int(layer.kept(adapter).sum()) for name, layer in adapted_layers(model, adapter).items()}


def reduced(updates: Mapping[str, Factors], method: Method) -> dict[str, Factors]:
    """The updates without ranks that hold nothing: what a plain LoRA of them needs.

    Where large factors cancel to a small update (`method.cancels`), float32 factors would carry their rounding into it:
    the update is decomposed in float64 and loses the directions that are rounding, and then the smallest directions of
    the whole adapter, as far as `method.negligible` allows.
    """
    if method.cancels:
        updates = _without_least({name: _recombined(f) for name, f in updates.items()}, method.negligible)
    return {name: f.kept() for name, f in updates.items()}


def _recombined(f: Factors) -> Factors:
    U, s, Vh = f.orthogonal()
    return Factors(U, torch.where(s > f.rounding(), s, 0), Vh)


def _without_least(updates: Mapping[str, Factors], share: float) -> Mapping[str, Factors]:
    """Decomposed updates less the smallest directions of all, which together hold at most `share` of the norm."""
    energy = torch.cat([f.s.detach().cpu().square() for f in updates.values()]).sort().values
    least = energy[energy.cumsum(0) <= share**2 * energy.sum()]
    floor = float(least.max().sqrt()) if len(least) else 0.0
    return {name: Factors(f.B, torch.where(f.s > floor, f.s, 0), f.A) for name, f in updates.items()}


def base_name(name: str) -> str:
    """A module's name in the base model, without PEFT's and compile's prefixes."""
    return name.removeprefix("_orig_mod.").removeprefix("base_model.model.").replace(".base_layer", "")


def _present(model: nn.Module) -> str:
    found = sorted({a for m in model.modules() if isinstance(m, AdapterLayer) for a in m.rankwise_tensors})
    return f"it has {', '.join(found)}" if found else "it has none"
