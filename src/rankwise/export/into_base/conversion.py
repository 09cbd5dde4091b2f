"""Which tensors of a model's files become which of its parameters, and how, there and back.

transformers keeps models whose files name or cut their weights otherwise than the modules do: a prefix more or less, a
list of experts that becomes one tensor, one tensor that becomes queries, keys and values. It says so in a list of
renamings and converters for each model, which is what loading and saving go by, and what this module goes by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from rankwise.errors import RankwiseError


@dataclass
class Unit:
    """Tensors of the files that become parameters together; mostly one of each, under two names."""

    keys: list[str] = field(default_factory=list)
    """Their names in the files."""
    parameters: list[str] = field(default_factory=list)
    """The parameters they become."""
    converter: WeightConverter | None = None
    """How; None where the tensor stays as it is."""
    patterns: dict[str, str] = field(default_factory=dict)
    """For each key, the pattern of the converter that it fits."""
    renamed: dict[str, str] = field(default_factory=dict)
    """For each key, its name where the converter finds it."""


class Conversion:
    """The units of a model and its files.

    Args:
        model: a skeleton, of transformers or any other library; only transformers' have names of their own in files.
        shapes: of every tensor in the files.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model: Any = model
        self._expected = model.state_dict()
        self._prefix = getattr(model, "base_model_prefix", None)
        conversions = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.units = self._units(shapes)
        self.unit_of = {name: unit for unit in self.units for name in unit.parameters}
        """The unit that makes each parameter."""

    def parameter_of(self, key: str) -> tuple[str, str | None]:
        """The parameter that a tensor of the files becomes, or the first of several, and its converter's pattern."""
        found = rename_source_key(key, self._renamings, self._converters, self._prefix, self._expected)
        if found[0] not in self._expected and key in self._expected:
            # As transformers: a renaming that leads nowhere does not apply to a key that is a parameter's name already.
            return rename_source_key(key, [], [], self._prefix, self._expected)
        return found

    def key_for(self, name: str) -> str:
        """The name in files of a parameter that the files do not hold yet: the one they would have, if it is read."""
        written = revert_weight_conversion(self._model, {name: self._expected[name]}) if self._renamings else {}
        return next((key for key in written if self.parameter_of(key)[0] == name), name)

    def to_parameters(self, unit: Unit, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters that a unit's tensors become."""
        if unit.converter is None:
            return {unit.parameters[0]: read(unit.keys[0])}
        converter = copy.deepcopy(unit.converter)
        first = self.parameter_of(unit.keys[0])[0]
        for key in unit.keys:
            converter.add_tensor(first, key, unit.patterns[key], read(key))  # type: ignore[arg-type]
        return _tensors(converter.convert(first, model=self._model, config=self._model.config))

    def to_files(self, unit: Unit, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the files that a unit's parameters come from.

        Raises:
            RankwiseError: transformers does not know the way back.
        """
        if unit.converter is None:
            return dict.fromkeys(unit.keys, parameters[unit.parameters[0]])
        try:
            back = unit.converter.reverse_transform()
            first = ""
            for name in sorted(unit.parameters, key=dot_natural_key):
                renamed, pattern = back.rename_source_key(name)
                first = first or renamed
                back.add_tensor(first, name, str(pattern), parameters[name])  # type: ignore[arg-type]
            made = _tensors(back.convert(first, model=self._model, config=self._model.config))  # type: ignore[attr-defined]
        except (NotImplementedError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise RankwiseError(
                f"the update of {unit.parameters[0]!r} cannot be written: transformers does not know the way back to "
                f"{unit.keys[0]!r} ({error})"
            ) from error
        keys = {self._bare(renamed): key for key, renamed in unit.renamed.items()}
        return {keys.get(self._bare(name), name): tensor for name, tensor in made.items()}

    def _units(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Unit]:
        of_pattern = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}
        units: dict[str, Unit] = {}
        for key in sorted(shapes, key=dot_natural_key):
            name, pattern = self.parameter_of(key)
            if name not in self._expected:
                continue
            unit = units.setdefault(name, Unit(parameters=[name]))
            unit.keys.append(key)
            if pattern is not None:
                unit.converter = of_pattern[pattern]
                unit.patterns[key] = pattern
                unit.renamed[key] = apply_renamings(key, self._renamings)
        for unit in units.values():
            if unit.converter is not None:
                made = self.to_parameters(unit, lambda key: torch.empty(shapes[key], device="meta"))
                unit.parameters = list(made)
        return list(units.values())

    def shapes_of(self, unit: Unit, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that a unit's tensors become."""
        made = self.to_parameters(unit, lambda key: torch.empty(shapes[key], device="meta"))
        return {name: tuple(made[name].shape) for name in unit.parameters}

    def check_way_back(self, unit: Unit, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `RankwiseError` where a unit's parameters do not become the tensors again that they came from."""
        if unit.converter is None:
            return
        there = self.to_parameters(unit, lambda key: torch.empty(shapes[key], device="meta"))
        again = {key: tuple(tensor.shape) for key, tensor in self.to_files(unit, there).items()}
        if again != {key: shapes[key] for key in unit.keys}:
            raise RankwiseError(
                f"the update of {unit.parameters[0]!r} cannot be written: transformers' way back to {unit.keys[0]!r} "
                f"leads to {min(again)!r}"
            )

    def _bare(self, name: str) -> str:
        """A name without the prefix that files of a model without a head leave out."""
        return name.removeprefix(f"{self._prefix}.")


def _tensors(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}
