"""The merged weights of a base model, worked out in groups as small as they can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from rankwise.errors import ArgumentError, RankwiseError
from rankwise.export.into_base.adapted import Adapted, tied_names, widened
from rankwise.export.into_base.checkpoint import WEIGHT_DTYPES, Checkpoint
from rankwise.export.into_base.conversion import Conversion, Unit
from rankwise.export.layouts import TOLERANCE


class Merging:
    """Adapters on skeletons of their base model, and the files that hold the base model's weights.

    What a weight W becomes is (1 − Σ wᵢ)·W + Σ wᵢ·Wᵢ over the adapters that change it, where Wᵢ is what PEFT makes of
    it with adapter i alone. For an update that is added to W this is W + Σ wᵢ·ΔWᵢ, and for a weight trained in full,
    whose wᵢ sum to 1, it is the average.

    Args:
        model: the base model's skeleton.
        adapted: one for each adapter.
        weights: one for each adapter.
        checkpoint: the base model's files.

    Raises:
        ArgumentError: the weights must sum to 1 and do not.
        RankwiseError: the adapters cannot be added up, or not be merged into these files.
    """

    def __init__(
        self, model: nn.Module, adapted: Sequence[Adapted], weights: Sequence[float], checkpoint: Checkpoint
    ) -> None:
        self._adapted = adapted
        self._weights = weights
        self._checkpoint = checkpoint
        self._shapes = {key: stored.shape for key, stored in checkpoint.stored.items()}
        self._wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self.conversion = Conversion(model, self._shapes)
        self.ties = tied_names(model)
        """Names of one and the same weight."""
        self._partner = self._find_partners()
        for adapter in adapted:
            self._leave_out_untrained(adapter)
        self.in_full = {name for adapter in adapted for name in adapter.in_full}
        """Names of weights that the adapters replace as a whole."""
        self._check_weights()
        self.groups = self._find_groups()
        """Names of the weights that change, in groups that are worked out together: those of one module, those that
        come from one tensor of the files, and tied ones."""
        for group in self.groups:
            self._check(group)
        self._check_shapes()

    def shape(self, name: str) -> tuple[int, ...]:
        """What a weight's shape becomes."""
        return self._wanted[name]

    @torch.no_grad()
    def results(self, group: Collection[str]) -> dict[str, Tensor]:
        """What the weights of a group become, in float32 at least, by their names.

        Those in which nothing changes are among them, unless the files lack them. A group can be asked for once, since
        its modules are given up.
        """
        before = self._before(group)
        total: dict[str, Tensor] = {}
        share: dict[str, float] = defaultdict(float)
        for adapter, weight in zip(self._adapted, self._weights, strict=True):
            before |= self._frozen(adapter, group)
            after = {name: adapter.given[name] for name in group if name in adapter.given}
            for module in dict.fromkeys(adapter.module_of[name] for name in group if name in adapter.module_of):
                after |= adapter.merged(module, before)
            for name, tensor in after.items():
                part = weight * widened(tensor)
                total[name] = total[name] + part if name in total else part
                share[name] += weight
        for name, tensor in total.items():
            rest = 1 - share[name]
            before[name] = tensor if abs(rest) <= TOLERANCE else tensor + rest * before[name]
        return before

    def _frozen(self, adapter: Adapted, group: Collection[str]) -> dict[str, Tensor]:
        """The base model's weights that an adapter holds itself, for their own names and for those tied to them."""
        held = {name: widened(adapter.frozen[name]) for name in group if name in adapter.frozen}
        tied: dict[str, Tensor] = {}
        for tie in self.ties:
            # Where the vocabulary has grown, only such a weight has the new rows, and the files' is too short.
            tied |= {other: held[name] for name in tie if name in held for other in tie if other in group}
        return tied | held

    def _before(self, group: Collection[str]) -> dict[str, Tensor]:
        """The weights of a group in the base model, as far as its files hold them."""
        found: dict[str, Tensor] = {}
        for unit in self.units(group):
            made = self.conversion.to_parameters(unit, self._read)
            found |= {name: made[name] for name in unit.parameters}
        for name in group:
            if name not in found and name in self._partner:
                found[name] = found[self._partner[name]]
        return {name: found[name] for name in group if name in found}

    def _read(self, key: str) -> Tensor:
        return widened(self._checkpoint.read(key))

    def units(self, group: Collection[str]) -> list[Unit]:
        """The tensors of the files that hold the weights of a group."""
        found = [self.conversion.unit_of.get(self._partner.get(name, name)) for name in group]
        return list({id(unit): unit for unit in found if unit is not None}.values())

    @property
    def lacking(self) -> list[str]:
        """The names of weights that are not in the files, nor tied to one that is."""
        return [name for name in self._wanted if name not in self.conversion.unit_of and name not in self._partner]

    def new_keys(self, names: Iterable[str]) -> dict[str, str]:
        """For each of some weights that the files lack, the name that it gets in them."""
        return {name: self.conversion.key_for(name) for name in names if name not in self.conversion.unit_of}

    def _find_partners(self) -> dict[str, str]:
        found = {}
        for tie in self.ties:
            held = next((name for name in tie if name in self.conversion.unit_of), None)
            if held is not None:
                found |= {name: held for name in tie if name not in self.conversion.unit_of}
        return found

    def _leave_out_untrained(self, adapter: Adapted) -> None:
        """Forget embeddings that PEFT has saved beside an adapter although they are the base model's."""
        for name, tensor in list(adapter.given.items()):
            same = self._before([name]).get(name)
            if same is not None and torch.equal(widened(same.to(tensor.dtype)), widened(tensor)):
                del adapter.given[name]

    def _check_weights(self) -> None:
        for adapter, weight in zip(self._adapted, self._weights, strict=True):
            if not adapter.is_linear and (len(self._adapted) > 1 or weight != 1):
                raise RankwiseError(
                    f"{adapter.folder} holds an update that depends on the base weight, as DoRA's does: it is merged "
                    f"alone and with weight 1, and here are {len(self._adapted)} adapters with weights {self._weights}"
                )
        replaced = [*self.in_full, *(name for adapter in self._adapted for name in adapter.by_rows)]
        if replaced and abs(sum(self._weights) - 1) > TOLERANCE:
            rule = f"sum to 1, since {replaced[0]!r} is trained in full: no update"
            raise ArgumentError("weights", rule, list(self._weights))
        for adapter in self._adapted:
            lacks = self.in_full - set(adapter.in_full)
            if lacks:
                raise RankwiseError(
                    f"{min(lacks)!r} is not trained in full in every adapter, so that it has no average: "
                    f"{adapter.folder} does not hold it"
                )

    def _find_groups(self) -> list[set[str]]:
        of_adapters = [names for adapter in self._adapted for names in adapter.names.values() if names]
        of_adapters += [[name] for adapter in self._adapted for name in adapter.given]
        of_files = [unit.parameters for unit in self.conversion.units if len(unit.parameters) > 1]
        changed = {name for names in of_adapters for name in names}
        return [group for group in connected([*of_adapters, *of_files, *self.ties]) if group & changed]

    def _check(self, group: Collection[str]) -> None:
        """Refuse what cannot be worked out or written, before time is spent."""
        for unit in self.units(group):
            for key in unit.keys:
                dtype = self._checkpoint.stored[key].dtype
                if dtype not in WEIGHT_DTYPES:
                    raise RankwiseError(f"the base model's {key!r} is quantised or no weight: its dtype is {dtype}")
            self.conversion.check_way_back(unit, self._shapes)

    def _check_shapes(self) -> None:
        """Refuse a base model of other shapes, of whatever weight the adapters do not hold themselves."""
        held = self.in_full.union(*(adapter.frozen for adapter in self._adapted))
        for unit in self.conversion.units:
            for name, shape in self.conversion.shapes_of(unit, self._shapes).items():
                if shape != self._wanted[name] and name not in held:
                    raise RankwiseError(
                        f"the base model's {unit.keys[0]!r} is {shape}, and that of the model which the adapters were "
                        f"trained on is {self._wanted[name]}: save that model, with its resized vocabulary if it has "
                        "one, and pass it as `base`"
                    )


def connected(groups: Iterable[Collection[str]]) -> list[set[str]]:
    """Groups of which several share a name, joined.

    >>> connected([["a"], ["b", "c"], ["c", "d"]])
    [{'a'}, {'b', 'c', 'd'}]
    """
    home: dict[str, set[str]] = {}
    for group in groups:
        joined = set(group).union(*(home[name] for name in group if name in home))
        home |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in home.values()}.values())
