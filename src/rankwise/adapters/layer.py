"""The one layer: a frozen base layer plus, for each adapter, the update its method makes.

PEFT's contract for a tuner layer is kept here and nowhere else. The base weight is never touched before an explicit
merge; a merge keeps the base weight, so that unmerging gives it back bit for bit.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.roster import Roster
from rankwise.adapters.tensors import AdapterTensors
from rankwise.errors import ArgumentError, RankwiseError
from rankwise.methods.base import Method, Size
from rankwise.update import Factors


class AdapterLinear(nn.Module, BaseTunerLayer):
    """A linear layer (or transformers' Conv1D) with low-rank updates added to it.

    Args:
        base_layer: the frozen layer.
        quantization: what PEFT's backends need to read a quantised base weight.
    """

    adapter_layer_names = ("rankwise_tensors",)
    other_param_names = ("rankwise_dropout", "scaling", "r", "methods", "rosters")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rankwise_tensors = nn.ModuleDict()
        self.rankwise_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.methods: dict[str, Method] = {}
        self.rosters: dict[str, Roster] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._pristine: tuple[nn.Parameter, Tensor] | None = None
        root = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(root, **quantization)
        self.fan_in_fan_out = isinstance(root, Conv1D)
        self.in_features, self.out_features = _features(root)
        self.register_state_dict_pre_hook(_start_before_saving)

    # --- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(
        self, adapter: str, method: Method, roster: Roster, *, r: int, scale: float, dropout: float
    ) -> None:
        """Create the tensors of `adapter` and give them their start.

        An adapter whose config came from a file is about to be loaded, so a start that reads the base weight waits
        until it turns out to be needed.
        """
        size = Size(self.out_features, self.in_features, min(r, self.in_features, self.out_features))
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        tensors = AdapterTensors(method, size, device or torch.device("cpu"))
        self.r[adapter], self.scaling[adapter], self.methods[adapter] = size.r, scale, method
        self.rosters[adapter] = roster
        self.rankwise_dropout[adapter] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.rankwise_tensors[adapter] = tensors
        roster.enrol(self)
        tensors.awaits_start = True
        if not (method.starts_from_weight and getattr(method, "from_file", False)):
            self.started(adapter)

    def tensors(self, adapter: str) -> AdapterTensors:
        """The tensors of `adapter` as they are."""
        return self.rankwise_tensors[adapter]  # type: ignore[return-value]

    def started(self, adapter: str) -> AdapterTensors:
        """The tensors of `adapter`, given their start if they still await it."""
        tensors = self.tensors(adapter)
        if tensors.awaits_start:
            tensors.awaits_start = False
            method = self.methods[adapter]
            if not (method.starts_from_weight and self.get_base_layer().weight.is_meta):
                zero = bool(getattr(method, "init_weights", True))
                tensors.fill(method.start(tensors.size, self.base_weight, zero=zero))
        return tensors

    def factors(self, adapter: str) -> Factors:
        """The update of `adapter` as evaluation mode computes it now, in the parameters' dtype."""
        return self.methods[adapter].factors(self.started(adapter).named(), self.scaling[adapter])

    def kept(self, adapter: str) -> Tensor:
        """Which ranks of `adapter` its method has not pruned, (r,)."""
        return self.methods[adapter].kept(self.started(adapter).named())

    # --- the base weight --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """The pristine base weight as float32 (out, in), dequantised, whatever is merged now."""
        if self._pristine is not None and self.quantization_backend is None:
            weight = self._pristine[1]
        else:
            weight = self.get_base_weight()
        return (weight.T if self.fan_in_fan_out else weight).float()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update of `adapter`, of the base weight's shape, at least float32."""
        B, s, A = self.factors(adapter)
        dtype = torch.promote_types(B.dtype, torch.float32)
        delta = Factors(B.to(dtype), s.to(dtype), A.to(dtype)).delta()
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight, keeping the base weight for `unmerge`.

        Args:
            safe_merge: refuse, with the base weight unchanged, if the result is not finite.
            adapter_names: which; the active ones by default.

        Raises:
            RankwiseError: `safe_merge` and the merged weight holds NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.rankwise_tensors]
        if not names:
            return
        current = self.get_base_weight()
        base = self.base_weight() if self.quantization_backend is None else current.float()
        base = base.T if self.fan_in_fan_out and self.quantization_backend is None else base
        fresh = names if self.quantization_backend is not None else [*self.merged_adapters, *names]
        merged = (base + sum(self.get_delta_weight(name) for name in fresh)).to(current.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise RankwiseError(f"NaN or infinity in the weights merged with adapter {', '.join(names)}")
        if self._pristine is None:
            weight: Any = self.get_base_layer().weight
            self._pristine = (weight, weight.data)
        self.set_base_weight(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base weight back, bit for bit."""
        if self._pristine is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer, (weight, data) = self.get_base_layer(), self._pristine
        weight.data = data.to(layer.weight.device)  # type: ignore[arg-type]
        layer.weight = weight
        self._pristine = None
        self.merged_adapters.clear()

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' updates of x."""
        if "adapter_names" in kwargs:
            raise ArgumentError("adapter_names", "be left out: batches of several adapters are not supported", "given")
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.rankwise_tensors:
                result = self._adapted(adapter, result, x)
        return result.to(dtype)

    def _adapted(self, adapter: str, result: Tensor, x: Tensor) -> Tensor:
        tensors = self.started(adapter)
        tensors.restore_exact()
        if tensors.unchecked and not torch.compiler.is_compiling():
            tensors.check_finite(adapter)
        factors = self.methods[adapter].factors(tensors.named(), self.scaling[adapter])
        x = self._cast_input_dtype(self.rankwise_dropout[adapter](x), factors.A.dtype)
        output = factors.add_to(result, x)
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.rosters[adapter].saw_forward(self, output)
        return output

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Every method's update is low-rank."""
        return True

    # --- copies -----------------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for roster in self.rosters.values():
            roster.enrol(self)

    def __repr__(self) -> str:
        return "rankwise." + super().__repr__()


def _features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a supported layer."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def _start_before_saving(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """State-dict hook: an adapter that still awaits its start gets it before it is saved."""
    if isinstance(layer, AdapterLinear):
        for adapter in layer.rankwise_tensors:
            layer.started(adapter)
