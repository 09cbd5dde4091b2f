"""LoRA+ (Hayou, Ghosh and Yu, 2024, arXiv 2402.12354): B trains at a multiple of A's learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from rankwise.adapters.lookup import adapted_layers
from rankwise.checks import require_number
from rankwise.errors import ArgumentError


def loraplus_groups(model: nn.Module, *, lr: float, ratio: float, adapter: str = "default") -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ for any optimiser of torch: B of every layer at lr·ratio, all else that trains at lr.

    PEFT's `create_loraplus_optimizer` looks for "lora_B" in the names of parameters, which these adapters do not have.

    Args:
        model: the adapted model.
        lr: the learning rate of A, of a method's gates, and of what is trained in full beside the adapter.
        ratio: B's learning rate by A's, η_B/η_A; the paper suggests about 16.
        adapter: the adapter's name.

    Raises:
        ArgumentError: the model has no such adapter, or a method without the A and B of LoRA; a number breaks its rule.

    Example:
        >>> import torch, rankwise
        >>> from peft import get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5))
        >>> model = get_peft_model(net, rankwise.SoraConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW(rankwise.loraplus_groups(model, lr=1e-3, ratio=16))
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(2, 0.001), (1, 0.016)]
    """
    require_number("lr", lr, least=1e-30)
    require_number("ratio", ratio, least=1e-30)
    layers = adapted_layers(model, adapter).values()
    tensors = [layer.started(adapter) for layer in layers]
    if not {"A", "B"} <= tensors[0].slots.keys():
        method = next(iter(layers)).methods[adapter].method
        raise ArgumentError("adapter", "be of a method with the A and B of LoRA", f"{adapter}: {method}")
    B = [each.get_parameter("B") for each in tensors]
    faster = {id(p) for p in B}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in faster], "lr": lr},
        {"params": [p for p in trained if id(p) in faster], "lr": lr * ratio},
    ]
