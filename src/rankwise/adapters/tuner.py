"""The one tuner: puts an `AdapterLayer` in place of each targeted module, whatever the method."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from rankwise.adapters.configs import AdapterConfig
from rankwise.adapters.convolution import AdapterConv2d
from rankwise.adapters.embedding import AdapterEmbedding
from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.linear import AdapterLinear
from rankwise.adapters.roster import Roster, living_rosters
from rankwise.adapters.targets import check_targets
from rankwise.adapters.tensors import ADDED_IN_FORMAT_2, AdapterTensors
from rankwise.errors import ArgumentError, nearest
from rankwise.methods.base import METHODS, Method

PREFIX = "rankwise_"
KINDS: tuple[type[AdapterLayer], ...] = (AdapterLinear, AdapterConv2d, AdapterEmbedding)
"""Every kind of layer that can be adapted."""
INSTEAD = {
    "add_weighted_adapter": "save the adapters, export them with rankwise.export_lora, and add the exports up with "
    "rankwise.merge_adapters(folders, out, weights=…)",
    "update_and_allocate": "ranks are allocated at the optimiser step; leave the call out",
    "subtract_mutated_init": "no method changes the base weight; leave the conversion out",
}
"""What stock scripts call on PEFT's own tuners, and what to do in its place."""


class RankwiseTuner(BaseTuner):
    """PEFT's tuner for every rankwise method."""

    prefix = PREFIX
    tuner_layer_cls = AdapterLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT, with one roster per adapter and unknown module names refused before anything is changed."""
        config: AdapterConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        check_names("target_modules", config.target_modules, model)
        # PEFT lists the head's two usual names for every classifier, of which a model has one; TRL, where it adds
        # tokens, lists "lm_head" for a reward model, too, which has none.
        listed_by_others = {"classifier", "score"} | ({"lm_head"} if config.trainable_token_indices else set())
        check_names("modules_to_save", set(config.modules_to_save or ()) - listed_by_others, model)
        _warn_of_experts(config, model)
        self._roster = Roster(adapter_name, config)
        self._roster.attach(model)
        self._clamped: list[str] = []
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self._clamped:
            warnings.warn(
                f"the rank is above the size of {len(self._clamped)} module(s) and is clamped there, as in "
                f"{self._clamped[0]!r}",
                stacklevel=2,
            )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """PEFT's last question before it changes the model, once `target_modules` has its default."""
        check_targets(peft_config, model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As PEFT; what is put back, a base layer or a head trained in full, keeps its weight as it is.

        PEFT would give it the weight of the module it replaces, which a head of several layers does not have.
        """
        if isinstance(new_module, AdapterLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def __getattr__(self, name: str) -> Any:
        """As PEFT, which goes on to the base model; but what PEFT's own LoRA and AdaLoRA can do is told apart."""
        if name in INSTEAD:
            raise AttributeError(f"rankwise adapters have no `{name}`: {INSTEAD[name]}")
        return super().__getattr__(name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT asks here around each forward pass: what can be is made for all layers at once (`together.py`)."""
        if kwargs.get("adapter_names") is not None:
            raise ArgumentError(
                "adapter_names", "be left out: batches of several adapters are not supported", kwargs["adapter_names"]
            )
        if torch.compiler.is_compiling():
            yield
            return
        with ExitStack() as passes:
            for roster in living_rosters():
                if roster.model is self.model:
                    passes.enter_context(roster.together.one_pass(roster.layers))
            yield

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled model: its layers have made rosters of their own."""
        super().__setstate__(state)
        for layer in self.model.modules():
            for roster in layer.rosters.values() if isinstance(layer, AdapterLayer) else ():
                roster.attach(self.model)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Buffers that DDP, asking the PeftModel it wraps, shall not send in every forward pass; see `Roster.meet`."""
        for layer in self.model.modules():
            for roster in layer.rosters.values() if isinstance(layer, AdapterLayer) else ():
                roster.in_ddp = True
        marked = [name for name, _ in self.model.named_buffers() if f".{PREFIX}tensors." in name]
        return [f"base_model.model.{name}" for name in marked]

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, AdapterLayer) else self._wrap(target, current_key)
        check_method(peft_config, layer, current_key)
        size = peft_config.size_of(current_key, layer.out_features, layer.in_features)
        scale, dropout = peft_config.scale_of(current_key), peft_config.lora_dropout
        layer.add_adapter(adapter_name, peft_config, self._roster, size=size, scale=scale, dropout=dropout)
        if size.started < peft_config.rank_of(current_key):
            self._clamped.append(current_key)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT; without the upcast, every parameter of the adapter takes the base's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.model.modules():
                if isinstance(layer, AdapterLayer) and adapter_name in layer.rankwise_tensors:
                    _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
                    if dtype is not None and dtype.is_floating_point and dtype.itemsize >= 2:
                        layer.tensors(adapter_name).follow_base_dtype(dtype)

    def _wrap(self, target: nn.Module, name: str) -> AdapterLayer:
        root = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = kind_of(root)
        if kind is None:
            kinds = "linear layers, Conv1D of transformers, Conv2d or Embedding"
            raise ArgumentError("target_modules", f"name {kinds}", f"{name}: {type(root).__name__}")
        broken = kind.refusal(root)
        if broken:
            raise ArgumentError("target_modules", broken[0], f"{name}: {broken[1]}")
        return kind(target, **get_quantization_kwargs(self.model))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As PEFT; ranks short of their budget are saved with a warning, unless by a trainer on its way.

        Raises:
            ArgumentError: a tensor of the adapter is missing from what shall be saved: it could not be loaded again.
        """
        layers = {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer) and adapter_name in m.rosters}
        roster = next(iter(layers.values())).rosters[adapter_name] if layers else None
        left = None if roster is None or roster.in_trainer else roster.unfinished()
        if left:
            warnings.warn(left, stacklevel=4)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        _check_all_saved(layers, adapter_name, state_dict, found)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT, but tensors of another kind of adapter are refused: PEFT would leave the adapter as it was.

        What is about to be loaded needs no start; PEFT reads the state dict on the way, which would give it one.
        """
        for layer in model.modules():
            if isinstance(layer, AdapterLayer) and adapter_name in layer.rankwise_tensors:
                layer.tensors(adapter_name).awaits_start = False
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected = {name for name in model.state_dict() if f".{PREFIX}tensors.{adapter_name}." in name}
        missing = {name for name in expected - remapped.keys() if not name.endswith(ADDED_IN_FORMAT_2)}
        if missing:
            raise ArgumentError(
                "state_dict",
                f"hold every tensor of the adapter, {sorted(missing)[0]!r} for one",
                sorted(state_dict)[:3],
            )
        return remapped


def _check_all_saved(
    layers: Mapping[str, AdapterLayer], adapter: str, given: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Raise `ArgumentError` where a caller's state dict lacks a tensor of the adapter, as one filtered by name does."""
    if not given and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return  # FSDP2 gathers the state dict on the process that saves, and gives the others an empty one
    for name, layer in layers.items():
        # FSDP holds the whole model under a name that its state dict leaves out.
        name = name.removeprefix("_fsdp_wrapped_module.")
        for own in layer.tensors(adapter).state_dict():
            key = f"{name}.{PREFIX}tensors.{adapter}.{own}"
            if key not in found:
                raise ArgumentError(
                    "state_dict", f"hold every tensor of the adapter, {key!r} for one", sorted(given)[:3]
                )


def _warn_of_experts(config: AdapterConfig, model: nn.Module) -> None:
    """Say which weights "all-linear" passes over though they are matrices: those of experts, fused into one tensor."""
    if config.target_modules != "all-linear":
        return
    fused = [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if not isinstance(module, AdapterTensors)  # another adapter's stack of factors
        for own, p in module.named_parameters(recurse=False)
        if p.dim() == 3 and len(p) > 1 and not type(module).__module__.startswith("torch.nn")
    ]
    if fused:
        warnings.warn(
            f"{len(fused)} fused weights of experts are no linear layers and are not adapted: {', '.join(fused[:3])}"
            f"{', …' if len(fused) > 3 else ''}",
            stacklevel=2,
        )


def kind_of(root: nn.Module) -> type[AdapterLayer] | None:
    """The layer class for a base layer; None where there is none."""
    return next((kind for kind in KINDS if isinstance(root, kind.wraps)), None)


def check_method(method: Method, layer: AdapterLayer, name: str) -> None:
    """Raise `ArgumentError` for a layer that is not linear and a method whose update is not of LoRA's form."""
    if method.linear_only and not isinstance(layer, AdapterLinear):
        able = ", ".join(other for other, cls in METHODS.items() if not cls.linear_only)
        found = f"{name}: {type(layer.get_base_layer()).__name__}"
        rule = f"name linear layers for {method.method} (convolutions and embeddings are for {able})"
        raise ArgumentError("target_modules", rule, found)


def check_names(argument: str, names: object, model: nn.Module) -> None:
    """Raise `ArgumentError`, with the nearest names, for a name or pattern that matches no module of the model.

    A list holds names, or the ends of names; a string is a regular expression, or "all-linear".
    """
    if names is None or names == "all-linear":
        return
    modules = [_name_in_base(name) for name, _ in model.named_modules() if name]
    listed = [names] if isinstance(names, str) else sorted(names)  # type: ignore[arg-type]
    for name in listed:
        matches = _pattern(argument, name).fullmatch if isinstance(names, str) else re.compile(_ending(name)).fullmatch
        if not any(matches(module) for module in modules):
            last = {module.rsplit(".", 1)[-1] for module in modules}
            known = modules if "." in name else sorted(part for part in last if not re.fullmatch(r"\d+", part))
            raise ArgumentError(argument, f"name modules of the model ({nearest(name, known)})", name)


def _name_in_base(name: str) -> str:
    """A module's name without what PEFT puts into it around adapted layers and around modules trained in full.

    A list of targets that PEFT has saved names the layers of a head, which an adapter that is already there may train
    in full.
    """
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)", "", name)


def _ending(name: str) -> str:
    return rf"(.*\.)?{re.escape(name)}"


def _pattern(argument: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ArgumentError(argument, f"be a regular expression ({error})", pattern) from error
