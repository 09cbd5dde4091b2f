"""Reading an adapted model: its layers, their updates, their ranks."""

from __future__ import annotations

from torch import nn

from rankwise.adapters.layer import AdapterLinear
from rankwise.errors import ArgumentError
from rankwise.update import Factors


def adapted_layers(model: nn.Module, adapter: str = "default") -> dict[str, AdapterLinear]:
    """The layers that carry `adapter`, by their names in the base model, in model order.

    Raises:
        ArgumentError: the model has no such adapter.
    """
    layers = {
        base_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLinear) and adapter in module.rankwise_tensors
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


def ranks(model: nn.Module, adapter: str = "default") -> dict[str, int]:
    """How many ranks of each module the method has not pruned, by module name in the base model.

    r for LoRA, NNM-LoRA and SORSA; the last allocation's kept set for AdaLoRA (init_r before the first); the gates
    that are not 0 for SoRA. What an export would hold is `status(model).parameters`.

    Raises:
        ArgumentError: the model has no such adapter.
    """
    return {name: int(layer.kept(adapter).sum()) for name, layer in adapted_layers(model, adapter).items()}


def base_name(name: str) -> str:
    """A module's name in the base model, without PEFT's and compile's prefixes."""
    return name.removeprefix("_orig_mod.").removeprefix("base_model.model.").replace(".base_layer", "")


def _present(model: nn.Module) -> str:
    found = sorted({a for m in model.modules() if isinstance(m, AdapterLinear) for a in m.rankwise_tensors})
    return f"it has {', '.join(found)}" if found else "it has none"
