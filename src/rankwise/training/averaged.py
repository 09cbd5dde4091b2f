"""Averages of a whole model: torch's `AveragedModel`, which Lightning's averaging uses as well.

`AveragedModel` is a copy of a model whose parameters it averages. With `use_buffers=True`, Lightning's default, it also
averages buffers, counters and booleans included: steps lag behind, and a rank once in use is in use for ever. The state
of an adapter cannot be averaged, so the copy takes it over from the model with every update. The average of a pruned
rank is not 0, but the copy then knows that the rank is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import wrapt
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rankwise.adapters.layer import AdapterLayer


def install() -> None:
    """Follow every update of every averaged model."""
    wrapt.wrap_function_wrapper(AveragedModel, "update_parameters", _follow)


def _follow(update: Callable[..., Any], average: AveragedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = update(*args, **kwargs)
    model: nn.Module = args[0] if args else kwargs["model"]
    with torch.no_grad():
        for own, other in zip(_adapter_buffers(average.module), _adapter_buffers(model), strict=False):
            own.copy_(other)
    return result


def _adapter_buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            yield from module.rankwise_tensors.buffers()
