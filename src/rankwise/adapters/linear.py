"""The linear kind of adapted layer, and the fast way through it.

Base layer and update are computed as one (`fused.py`) wherever that is what the plain way computes, to rounding: one
adapter, one dtype, a plain frozen weight, nothing hooked in between. All else takes the plain way: quantised weights,
several adapters, inputs of another dtype than the parameters, graphs being compiled or transformed, ranks being scored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.fused import fused_linear, worth_adding
from rankwise.adapters.layer import AdapterLayer, check_samples
from rankwise.derivatives import by_hand
from rankwise.update import Factors, Parts

FUSED = {torch.float32, torch.float64, torch.bfloat16}
"""Not float16: its products overflow in another order of factors, and what would have been a step is none."""


class AdapterLinear(AdapterLayer):
    """A linear layer, or transformers' Conv1D, with low-rank updates added to it."""

    wraps = (nn.Linear, Conv1D)

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__(base_layer, **quantization)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    @staticmethod
    def matrix_shape(root: Any) -> tuple[int, int]:
        """(out, in); the weight of Conv1D is (in, out)."""
        if isinstance(root, Conv1D):
            return root.weight.shape[1], root.weight.shape[0]
        return root.out_features, root.in_features

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight itself, of Conv1D transposed."""
        return weight.T if self.fan_in_fan_out else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The matrix itself, for Conv1D transposed."""
        return matrix.T if self.fan_in_fan_out else matrix

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Every method's update is low-rank."""
        return True

    # --- forward ----------------------------------------------------------------------------------------------------

    def _add(self, adapter: str, factors: Factors, result: Tensor, x: Tensor) -> Tensor:
        dropped, gates = self._dropped(adapter, x, factors.A.dtype), self.gates.get(adapter)
        if gates is not None and gates.dim() > 1:
            check_samples(gates, x)
            gates = gates.view(len(gates), *[1] * (x.dim() - 2), gates.shape[1])
        return factors.add_to(result, dropped, gates)

    def _at_once(self, adapter: str, x: Tensor) -> Tensor | None:
        base = plain_weights(self.base_layer) if by_hand() and adapter not in self.gates else None
        if base is None:
            return None
        (weight, b), tensors = base, self._ready(adapter)
        dtype = common_dtype(x, weight, next(iter(tensors.values())))
        if dtype is None:
            return None
        dropped, W = self.rankwise_dropout[adapter](x), self.as_matrix(weight)
        z = None if dropped is x else dropped.to(dtype)
        W, frozen, beside, (B, s, A) = self._parts(adapter, tensors, W, x if z is None else None, dtype)
        joined = None if beside is None else self.methods[adapter].joined_with_frozen(tensors)
        opened = self.methods[adapter].ranks_open(tensors) if self.training and torch.is_grad_enabled() else None
        if opened is not None:  # elsewhere others may have copied parameters in, and not the mask: TRL's reference
            k = self.tensors(adapter).open_prefix(opened)
            B, s, A = B[:, :k], None if s is None else s[:k], A[:k]
        if torch.is_autocast_enabled(x.device.type):
            x, W, B, A = (t.to(dtype) for t in (x, W, B, A))
            b = None if b is None else b.to(dtype)
            joined = None if joined is None else (joined[0].to(dtype), joined[1].to(dtype))
        elif {B.dtype, A.dtype, dtype if b is None else b.dtype} != {dtype}:
            return None
        scale = self.factor_of(adapter)
        return fused_linear(x, z, W, b, Parts(B, s, A), frozen, beside=beside, joined=joined, scale=scale)

    def _parts(
        self, adapter: str, tensors: dict[str, Tensor], W: Tensor, x: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Factors | None, Factors | None, Parts]:
        """The weight (out, in), what is frozen of the update: to be added to it, or beside it; and the (other) update.

        No x: dropout, which the whole update sees.
        """
        method = self.methods[adapter]
        frozen = method.frozen_part(tensors)
        if frozen is None:
            return W, None, None, self._update(adapter, tensors)
        moving = method.moving_part(tensors)
        if x is not None and method.caches_frozen_part:
            return self._folded(adapter, frozen), None, None, moving
        if x is not None and worth_adding(x, W, frozen.r, dtype):
            return W, frozen, None, moving
        return W, None, frozen, moving

    def _folded(self, adapter: str, frozen: Factors) -> Tensor:
        """The base weight (out, in) with the frozen part of the update folded in, made once."""
        tensors = self.tensors(adapter)
        if tensors.folded is None or tensors.folded[0] != tensors.edits:
            _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
            with torch.inference_mode(False), torch.no_grad():  # whoever comes first, training may come later
                tensors.folded = (tensors.edits, (self.base_weight() + frozen.delta().float()).to(dtype))
        return tensors.folded[1]


def plain_weights(base: Any) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias of a base layer that computes W x + b of frozen tensors, if nobody has hooked into it."""
    own = vars(base)  # torch finds parameters and modules by a search, which every layer of a small model would feel
    if type(base) not in AdapterLinear.wraps or "forward" in own or _has_any_global_hook():
        return None
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    parameters = own["_parameters"]
    if not parameters.keys() >= {"weight", "bias"}:
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    plain = all(type(t) in (Tensor, nn.Parameter) and not t.requires_grad for t in (weight, bias) if t is not None)
    return (weight, bias) if plain and weight is not None else None


def common_dtype(x: Tensor, weight: Tensor, parameters: Tensor) -> torch.dtype | None:
    """The dtype that the base layer and the update are both computed in, None where they are not."""
    if type(x) not in (Tensor, nn.Parameter) or x.is_meta or x.is_nested:
        return None
    dtypes = {x.dtype, weight.dtype, parameters.dtype}
    if torch.is_autocast_enabled(x.device.type):
        narrow = dtypes <= {torch.float32, torch.float16, torch.bfloat16}
        dtypes = {torch.get_autocast_dtype(x.device.type)} if narrow else set()
    return next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= FUSED else None
