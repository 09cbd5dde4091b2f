"""The adapted layer: a frozen base layer plus, for each adapter, the update its method makes.

PEFT's contract for a tuner layer is kept here and nowhere else. The base weight is never touched before an explicit
merge; a merge keeps the base weight, so that unmerging gives it back bit for bit.

`AdapterLayer` holds everything but what a kind of base layer decides: how its weight is a matrix (out, in), and how an
update of that matrix is added to an output. The kinds are in `linear.py`, `convolution.py` and `embedding.py`.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from rankwise.adapters.peers import mean
from rankwise.adapters.probe import GradientProbe
from rankwise.adapters.roster import Roster
from rankwise.adapters.tensors import AdapterTensors
from rankwise.derivatives import by_hand
from rankwise.errors import ArgumentError, RankwiseError, TrainingError
from rankwise.methods.base import Method
from rankwise.methods.stack import Size
from rankwise.update import Factors, Parts


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A layer with low-rank updates added to it.

    Args:
        base_layer: the frozen layer.
        quantization: what PEFT's backends need to read a quantised base weight.
    """

    adapter_layer_names = ("rankwise_tensors",)
    other_param_names = ("rankwise_dropout", "scaling", "r", "methods", "rosters")

    wraps: ClassVar[tuple[type[nn.Module], ...]]
    """The base layers of this kind."""

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
        self.passed_by: bool | None = None  # True: the model read the weight and never ran the layer; False: it ran
        self.gates: dict[str, Tensor | None] = {}  # while ranks are scored: gates (r,) or (samples, r); None: off
        root = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(root, **quantization)
        self.out_features, self.in_features = self.matrix_shape(root)
        self.register_state_dict_pre_hook(_start_before_saving)

    # --- what a kind of layer decides -------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def matrix_shape(root: nn.Module) -> tuple[int, int]:
        """(out, in) of the base weight as a matrix."""

    @staticmethod
    def refusal(root: nn.Module) -> tuple[str, str] | None:
        """The rule that a base layer of this kind breaks, and what was found in it."""
        return None

    @abstractmethod
    def as_matrix(self, weight: Tensor) -> Tensor:
        """The base weight, or an update of it, as a matrix (out, in)."""

    @abstractmethod
    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the base weight's shape."""

    @abstractmethod
    def _add(self, adapter: str, factors: Factors, result: Tensor, x: Tensor) -> Tensor:
        """Result + the update of the input x, with the gates of `adapter` where it has some."""

    def _at_once(self, adapter: str, x: Tensor) -> Tensor | None:
        """Base layer and update as one, where there is a faster way than one after the other."""
        return None

    # --- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(
        self, adapter: str, method: Method, roster: Roster, *, size: Size, scale: float, dropout: float
    ) -> None:
        """Create the tensors of `adapter` and give them their start.

        An adapter whose config came from a file is about to be loaded, so a start that reads the base weight waits
        until it turns out to be needed.
        """
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        tensors = AdapterTensors(method, size, device or torch.device("cpu"))
        self.r[adapter], self.scaling[adapter], self.methods[adapter] = size.started, scale, method
        self.rosters[adapter] = roster
        self.rankwise_dropout[adapter] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.rankwise_tensors[adapter] = tensors
        roster.enrol(self)
        tensors.awaits_start = True
        if not (method.starts_from_weight and getattr(method, "from_file", False)):
            self.started(adapter)

    def tensors(self, adapter: str) -> AdapterTensors:
        """The tensors of `adapter` as they are."""
        # Not by attribute, which torch finds by a search: every forward pass comes through here several times.
        return self._modules["rankwise_tensors"]._modules[adapter]  # type: ignore[return-value,union-attr]

    def started(self, adapter: str) -> AdapterTensors:
        """The tensors of `adapter`, given their start if they still await it.

        Raises:
            RankwiseError: accelerate has moved them out of memory.
        """
        tensors = self.tensors(adapter)
        if "_hf_hook" in vars(tensors) and tensors.trained()[0].is_meta:
            raise RankwiseError(
                f"accelerate has offloaded the tensors of adapter {adapter!r}, which are needed between passes, too: "
                'leave the adapted layers out of "cpu" and "disk" in the device map'
            )
        if tensors.awaits_start:
            tensors.awaits_start = False
            method = self.methods[adapter]
            if not (method.starts_from_weight and self.get_base_layer().weight.is_meta):
                zero = bool(getattr(method, "init_weights", True))
                tensors.fill(method.start(tensors.size, self.base_weight, zero=zero))
        return tensors

    def factors(self, adapter: str) -> Factors:
        """The update of `adapter` as evaluation mode computes it now, in the parameters' dtype."""
        return self.methods[adapter].evaluation_factors(self.started(adapter).gathered(), self.scaling[adapter])

    def trained_factors(self, adapter: str) -> Factors:
        """The part of the update that training moves, in the parameters' dtype."""
        return self.methods[adapter].moving_factors(self.started(adapter).gathered(), self.scaling[adapter])

    def kept(self, adapter: str) -> Tensor:
        """Which ranks of `adapter` its method has not pruned, (r,)."""
        return self.methods[adapter].ranks_left(self.started(adapter).gathered())

    # --- the base weight --------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """As PEFT, the base weight. A model that multiplies by it, rather than run the layer, passes the update by."""
        if self.passed_by is None and not torch.compiler.is_compiling():
            self.passed_by = True
        return super().weight  # type: ignore[return-value]  PEFT's property, which torch's __getattr__ hides

    @torch.no_grad()
    def base_weight(self) -> Tensor:
        """The pristine base weight as float32 (out, in), dequantised, whatever is merged now."""
        return self.as_matrix(self._unmerged()).float()

    def _unmerged(self) -> Tensor:
        """The base weight before any merge; of a quantised layer, whose merges round, the weight as it is now."""
        if self._pristine is not None and self.quantization_backend is None:
            return self._pristine[1]
        return self.get_base_weight()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update of `adapter`, of the base weight's shape, at least float32."""
        B, s, A = self.factors(adapter)
        dtype = torch.promote_types(B.dtype, torch.float32)
        return self.as_weight(Factors(B.to(dtype), s.to(dtype), A.to(dtype)).delta())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight, keeping the base weight for `unmerge`.

        The sum is a parameter of its own, so that a layer that shares its weight (a tied output layer) keeps the old
        one.

        Args:
            safe_merge: refuse, with the base weight unchanged, if the result is not finite.
            adapter_names: which; the active ones by default.

        Raises:
            RankwiseError: `safe_merge` and the merged weight holds NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.rankwise_tensors]
        if not names:
            return
        plain = self.quantization_backend is None
        dtype = self.get_base_weight().dtype
        fresh = [*self.merged_adapters, *names] if plain else names
        merged = (self._unmerged().float() + sum(self.get_delta_weight(name) for name in fresh)).to(dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise RankwiseError(f"NaN or infinity in the weights merged with adapter {', '.join(names)}")
        if self._pristine is None:
            layer = self.get_base_layer()
            weight: Any = layer.weight
            self._pristine = (weight, weight.data)
            if plain:
                layer.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
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
        held = self.rankwise_tensors
        adapters = [name for name in self.active_adapters if name in held]
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        training = self.training and not torch.compiler.is_compiling()
        for adapter in adapters if training else ():
            self.rosters[adapter].meet(self)
        result = self._at_once(adapters[0], x) if len(adapters) == 1 and not args and not kwargs else None
        if result is None:
            result = self._one_by_one(adapters, x, *args, **kwargs)
        if training and torch.is_grad_enabled():
            if self.passed_by is not False:
                self.passed_by = False
            for adapter in adapters:
                result = self._watched(adapter, result, x)
        return result

    def _one_by_one(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer, and the updates added to its output, in its dtype."""
        result = base = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            if self.gates.get(adapter, x) is not None:
                update = self._update(adapter, self._ready(adapter)).scaled(self.factor_of(adapter))
                result = self._add(adapter, update, result, x)
        return result.to(base.dtype)

    def _ready(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of `adapter` by name: started, of their right dtypes and known to be finite."""
        tensors = self.started(adapter)
        if self.rosters[adapter].sharded and tensors.rounded():
            raise TrainingError(
                "FSDP2's MixedPrecisionPolicy would round gates and singular values: leave param_dtype out, and train "
                "under autocast"
            )
        tensors.restore_exact()
        if tensors.unchecked and not torch.compiler.is_compiling():
            tensors.check_finite(adapter)
        return tensors.named() | self._made_together(adapter, tensors)

    def _made_together(self, adapter: str, tensors: AdapterTensors) -> dict[str, Tensor]:
        """What was made of the tensors for all layers of this pass at once; nothing where this layer makes its own."""
        together = self.rosters[adapter].together
        return together.take(tensors) if self.training and by_hand() else {}

    def _update(self, adapter: str, tensors: dict[str, Tensor]) -> Parts:
        """The update that this pass computes, in training with what is drawn at random, but for its scale."""
        method = self.methods[adapter]
        return method.training_parts(tensors) if self.training else method.evaluation_parts(tensors)

    def factor_of(self, adapter: str) -> float:
        """What the update of `adapter` is multiplied by."""
        return self.methods[adapter].factor_of(self.scaling[adapter])

    def _watched(self, adapter: str, output: Tensor, x: Tensor) -> Tensor:
        """The output, seen by a start that waits for a gradient and by the roster."""
        tensors = self.tensors(adapter)
        if tensors.awaits_gradient:
            if not self.rosters[adapter].sharded:  # FSDP2 runs layers on parameters of its own
                tensors.observe_gradients()
            output = GradientProbe.apply(output, x, partial(self._start_from_gradient, adapter))
        self.rosters[adapter].saw_forward(self, output)
        return output

    def _dropped(self, adapter: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input of the update: x after dropout, in the factors' dtype."""
        return self._cast_input_dtype(self.rankwise_dropout[adapter](x), dtype)

    def _start_from_gradient(self, adapter: str, gradient: Tensor) -> None:
        """Work out the start now and keep only that; a step takes it up if its gradients are of this backward pass.

        A gradient that is not finite, or zero (a batch whose labels are all masked), gives none: the next one may.
        """
        tensors = self.tensors(adapter)
        if not tensors.awaits_gradient:
            return
        roster, accumulated = self.rosters[adapter], tensors.observed_gradient()
        if roster.sharded and tensors.from_gradient:  # no pass is known from another there: the first one counts
            return
        if not tensors.starts.wants_more(accumulated, changed_by_others=roster.peers is not None):
            return
        tensors.saw_gradient = True
        gradient = mean(gradient, roster.peers)
        largest = float(torch.linalg.vector_norm(gradient, torch.inf))
        if 0 < largest < torch.inf:
            tensors.starts.add(self.methods[adapter].start_from_gradient(tensors.size, gradient), accumulated)

    # --- copies -----------------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for roster in self.rosters.values():
            roster.enrol(self)

    def __repr__(self) -> str:
        return "rankwise." + super().__repr__()


class NotPerSampleError(RankwiseError):
    """A layer's input has another first dimension than the batch, so that gates per sample cannot be applied."""


def check_samples(gates: Tensor, x: Tensor) -> None:
    """Raise `NotPerSampleError` unless x has one entry per gate row along its first dimension."""
    if x.shape[0] != len(gates):
        raise NotPerSampleError(f"{len(gates)} samples have gates and the layer's input is of shape {tuple(x.shape)}")


def _start_before_saving(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """State-dict hook: an adapter that still awaits its start gets it before it is saved, its counters are right."""
    if isinstance(layer, AdapterLayer):
        for adapter in layer.rankwise_tensors:
            layer.rosters[adapter].catch_up()
            layer.started(adapter)
