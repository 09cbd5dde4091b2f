"""A base model without its weights on which PEFT has put an adapter, and what its modules become when they are merged.

PEFT itself places the adapter's tensors and merges a module, one at a time, so that the base model's weights are never
in memory together, and whatever PEFT computes for a kind of layer or adapter is what is written.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import Tensor, nn

from rankwise.adapters.layer import AdapterLayer
from rankwise.errors import AdapterFileError, RankwiseError, nearest

WITHIN = (".base_layer", ".original_module", ".token_adapter")
"""What PEFT puts into the names of a base model's weights."""
ZERO = torch.zeros((), dtype=torch.float32)
"""What all stand-ins for weights share."""
CANNOT_LOAD = (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError, NotImplementedError)
"""What PEFT raises for an adapter that does not fit a model."""


class Adapted:
    """A skeleton with one adapter on it.

    Args:
        skeleton: the base model's modules without weights; PEFT changes them in place.
        folder: the adapter's, for messages.
        config: the adapter's, as PEFT reads it.
        tensors: the adapter's.

    Raises:
        AdapterFileError: PEFT cannot put the adapter on this model, or finds no place there for one of its tensors.
    """

    def __init__(self, skeleton: nn.Module, folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        self.folder = folder
        self._base = skeleton
        own_names = list(skeleton.state_dict())
        ties = tied_names(skeleton)
        _fill_with_stand_ins(skeleton)
        self._load(config, tensors)
        self.modules: dict[str, Any] = dict(_outermost(skeleton))
        """The modules that the adapter changes, by their names in the base model."""
        self.names: dict[str, list[str]] = {name: [] for name in self.modules}
        """The names of the weights in each of them."""
        for name in own_names:
            home = next((parent for parent in _parents(name) if parent in self.modules), None)
            if home is not None:
                self.names[home].append(name)
        self.module_of = {own: name for name, inside in self.names.items() for own in inside}
        """The module of each of them."""
        self.given: dict[str, Tensor] = {}
        """Weights that the adapter holds in place of the base model's: trained biases, and embeddings."""
        self.frozen: dict[str, Tensor] = {}
        """Frozen weights of adapted embeddings, which PEFT saves beside their updates."""
        self._find_given(set(own_names), ties)

    def _load(self, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """Put the adapter on the skeleton."""
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        # PEFT adds in the dtype of the base weight that it finds, which for embeddings is in the adapter's file.
        is_added_to = (".lora_", ".base_layer.")
        wide = {key: widened(t) if any(part in key for part in is_added_to) else t for key, t in tensors.items()}
        try:
            with warnings.catch_warnings():
                # About tied weights and layers of other kinds, which are taken care of here.
                warnings.simplefilter("ignore")
                model = kind(self._base, config, low_cpu_mem_usage=True)
                result = set_peft_model_state_dict(model, wide, low_cpu_mem_usage=True)
        except RankwiseError:
            raise
        except CANNOT_LOAD as error:
            raise AdapterFileError(f"{self.folder} does not fit the base model: {_sentence(error)}") from error
        # PEFT saves the tokens of tied embeddings twice where the vocabulary has grown, and reads one of the two.
        unexpected = [key for key in result.unexpected_keys if not key.endswith(".trainable_tokens_delta")]
        if unexpected:
            key = unexpected[0]
            modules = [name for name, _ in self._base.named_modules() if name and ".lora_" not in name]
            raise AdapterFileError(f"the base model has no place for {key!r} of {self.folder}: {nearest(key, modules)}")
        missing = next((name for name, t in model.named_parameters() if t.is_meta), None)
        if missing:
            raise AdapterFileError(f"{self.folder} lacks {missing!r}, which its config asks for on this base model")
        model.eval()

    def _find_given(self, own_names: set[str], ties: list[list[str]]) -> None:
        for name, parameter in self._base.named_parameters(remove_duplicate=False):
            own = own_name(name)
            if own not in own_names or _is_stand_in(parameter):
                continue
            is_adapted = any(parent in self.modules for parent in _parents(own))
            found = self.frozen if is_adapted and own.endswith(".weight") else self.given
            found[own] = parameter.detach()
        # Of tied weights, a file may hold one for all.
        for tie in ties:
            held = next((self.given[name] for name in tie if name in self.given), None)
            if held is not None:
                self.given |= {name: held for name in tie if name not in self.given and name not in self.module_of}

    @property
    def in_full(self) -> list[str]:
        """The names of weights that the adapter replaces as a whole."""
        saved = [name for name, module in self.modules.items() if isinstance(module, ModulesToSaveWrapper)]
        return [*self.given, *(own for name in saved for own in self.names[name])]

    @property
    def by_rows(self) -> list[str]:
        """The names of weights of which the adapter replaces rows."""
        tokens = [name for name, module in self.modules.items() if isinstance(module, TrainableTokensWrapper)]
        return [own for name in tokens for own in self.names[name]]

    @property
    def is_linear(self) -> bool:
        """Whether the update does not depend on the base weight, as DoRA's does, so that it can be scaled and added."""
        return not any(getattr(module, "lora_variant", None) for module in self._base.modules())

    @property
    def unfinished(self) -> str | None:
        """A sentence about ranks that a rankwise adapter's training left short of their budget."""
        layers = [module for module in self.modules.values() if isinstance(module, AdapterLayer)]
        return next((roster.unfinished() for layer in layers for roster in layer.rosters.values()), None)

    def merged(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the weights of a module become. The module is given up by this, with all it holds.

        Args:
            name: of one of `modules`.
            values: the base model's weights by name, those of this module among them.

        Raises:
            RankwiseError: the base model lacks a weight of which the adapter holds only an update.
        """
        module = self.modules.pop(name)
        parent, _, child = name.rpartition(".")
        setattr(self._base.get_submodule(parent), child, nn.Identity())
        is_replaced = isinstance(module, ModulesToSaveWrapper)
        if not is_replaced:
            self._fill(name, module, values)
        try:
            if hasattr(module, "unload_and_optionally_merge_module"):
                plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                module.merge()
                plain = module.get_base_layer()
        except CANNOT_LOAD as error:
            raise RankwiseError(f"PEFT cannot merge {name!r} of {self.folder}: {_sentence(error)}") from error
        found = {f"{name}.{key}".replace(".base_layer", ""): t.detach() for key, t in plain.state_dict().items()}
        return {own: found[own] for own in self.names[name] if own in found}

    def _fill(self, name: str, module: Any, values: Mapping[str, Tensor]) -> None:
        """Give the base layer of a module its weights."""
        base = module.original_module if isinstance(module, TrainableTokensWrapper) else module.get_base_layer()
        state = {}
        for key in base.state_dict():
            own = f"{name}.{key}".replace(".base_layer", "")
            if own not in self.names[name]:
                continue
            held = self.given.get(own, self.frozen.get(own))
            if held is not None:
                state[key] = widened(held).clone()
                continue
            if own not in values:
                raise RankwiseError(
                    f"the base model's files hold no {own!r}, and {self.folder} holds only an update of it"
                )
            state[key] = values[own].clone()
        base.load_state_dict(state, strict=False, assign=True)


def _fill_with_stand_ins(model: nn.Module) -> None:
    """Give a skeleton weights that take no memory: the one zero, shown in every place of their shapes.

    PEFT moves what it loads to where the base weight is, so that these cannot be on the meta device.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made.setdefault(parameter, nn.Parameter(ZERO.expand(parameter.shape), requires_grad=False))
                module._parameters[name] = made[parameter]


def _is_stand_in(tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == ZERO.untyped_storage().data_ptr()


def _outermost(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that PEFT has put in the place of others, but for those inside of such."""
    last = None
    for name, module in model.named_modules():
        if last is not None and name.startswith(f"{last}."):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            last = name
            yield name, module


def widened(tensor: Tensor) -> Tensor:
    """A tensor in the dtype that it is worked on in: float32, or float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names of one and the same weight of a model."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return [found for found in names.values() if len(found) > 1]


def own_name(name: str) -> str:
    """A weight's name in the base model as it was before PEFT."""
    for part in WITHIN:
        name = name.replace(part, "")
    return name


def _parents(name: str) -> Iterator[str]:
    """The names of the modules around a weight, the nearest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _sentence(error: Exception) -> str:
    """The line of an error that says most: of several, the first that is indented."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if len(lines) > 1 else lines[0]
