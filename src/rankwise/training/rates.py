"""The learning rates that an optimiser really applies. Some rules multiply by them (SoRA), some divide (SORSA, SaLoRA).

The `lr` of a parameter group is not always that rate:

- Prodigy and D-Adaptation estimate a distance d while they run and move by d·lr; their lr is 1 unless changed.
- Schedule-free optimisers warm up by themselves, and write the rate of their last step under `scheduled_lr`.
- Adafactor with `relative_step=True` works out a rate for every parameter and tells nobody; with `scale_parameter=True`
  it multiplies `lr` by the size of the parameter, and so does torch's own Adafactor.
- Adadelta works out its steps from those before; its lr is a factor of them, 1 unless changed.
- Other optimisers that find a rate by themselves take `lr` for a factor too, and leave it at 1.

The peak of a parameter's schedule is what the schedule declares: `max_lr` (OneCycleLR), else `initial_lr`, which every
other scheduler of torch writes. Where nothing is declared (rates set by hand, ReduceLROnPlateau), or the rate rises
above what is (CyclicLR), the peak is the highest rate seen so far. It is stored with the adapter, so that a resumed run
goes on with the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rankwise.adapters.tensors import AdapterTensors
from rankwise.shards import write

Group = Mapping[str, Any]
"""A parameter group of an optimiser."""

NOMINAL = 1.0
"""From here on a number is a factor and no rate: LambdaLR is often given a base of 1 and a function that returns rates,
and an optimiser that finds its rate by itself an `lr` of 1. Plain SGD may move by a rate of 1 and more."""
ROUNDING = 1e-6
"""A rate above the declared peak by less than this share is the peak, rounded."""
DISTANCE_KEYS = frozenset({"d0", "d_max", "growth_rate", "numerator_weighted"})
"""What stands beside an estimated distance `d`. The `d` of torch's Adafactor is a threshold for clipping instead."""


SGD_KEYS = frozenset({"dampening", "nesterov"})
ADADELTA_KEYS = frozenset({"rho", "eps"})
MOMENTUM_KEYS = frozenset({"betas", "momentum"})
"""What Adadelta does not have, but the optimisers inside SAM, which has a `rho` too."""
TORCH_ADAFACTOR_KEYS = frozenset({"beta2_decay", "d"})


def estimates_distance(group: Group) -> bool:
    """Whether the optimiser estimates a distance d and moves by d·lr (Prodigy, D-Adaptation)."""
    return "d" in group and not DISTANCE_KEYS.isdisjoint(group)


def rate_of(group: Group) -> float | None:
    """The learning rate of a group's coming step; None where `lr` is not that and nothing else tells it.

    >>> rate_of({"lr": 1.0, "d": 2e-6, "d0": 1e-6})
    2e-06
    """
    lr = group["lr"]
    if lr is None or _moves_otherwise(group):
        return None
    if estimates_distance(group):
        return float(lr) * float(group["d"])
    real = group.keys() >= SGD_KEYS or "scheduled_lr" in group
    return float(lr) if real or float(lr) < NOMINAL else None


def _moves_otherwise(group: Group) -> bool:
    """Whether the optimiser is an Adafactor that works out or scales its rate, or Adadelta."""
    adafactor = group.get("relative_step") or group.get("scale_parameter") or group.keys() >= TORCH_ADAFACTOR_KEYS
    return bool(adafactor) or (group.keys() >= ADADELTA_KEYS and MOMENTUM_KEYS.isdisjoint(group))


def declared_peak(group: Group) -> float:
    """The highest rate of a group's schedule as its scheduler wrote it down; 0 where none did.

    >>> declared_peak({"lr": 4e-5, "initial_lr": 4e-5, "max_lr": 1e-3}), declared_peak({"lr": 1e-4, "initial_lr": 1.0})
    (0.001, 0.0)
    """
    if estimates_distance(group):
        return 0.0  # a scheduler knows the factor lr, not the distance that it multiplies
    if group.get("max_lr"):
        return float(group["max_lr"])
    initial = float(group.get("initial_lr") or 0.0)
    return initial if initial < NOMINAL else 0.0


class Rates:
    """The rate and the peak rate of every parameter of one adapter, at one optimiser step."""

    def __init__(self) -> None:
        self.unknown = False
        """Whether the optimiser keeps the rate of a parameter to itself."""
        self.estimated = False
        """Whether the optimiser is still finding a rate, so that the peak seen so far says nothing of the run."""
        self._now: dict[int, tuple[Group, float, float]] = {}  # by the parameter's id: its group, rate and peak
        self._seen: list[list[float]] | None = None  # the highest undeclared rate of each layer's tensors; None: stored
        self._rose = False

    def forget(self) -> None:
        """Read the stored peaks again: somebody has loaded others."""
        self._seen = None

    def read(self, members: Sequence[AdapterTensors], groups: Mapping[int, Group]) -> None:
        """Take the rates of the coming step. They must be read before it: Prodigy changes d within a step.

        Args:
            members: the adapter's tensors, layer by layer.
            groups: the optimiser's groups, by the ids of the parameters in them.
        """
        if self._seen is None:
            self._seen = _stored(members)
        distinct = {id(group): group for group in groups.values()}
        told = {key: (rate_of(group), declared_peak(group)) for key, group in distinct.items()}
        self._now, self.unknown, self.estimated = {}, False, False
        for tensors, seen in zip(members, self._seen, strict=True):
            for i, parameter in enumerate(tensors.trained()):
                group = groups.get(id(parameter))
                if group is None:
                    continue
                rate, declared = told[id(group)]
                self.unknown |= rate is None
                self.estimated |= estimates_distance(group)
                rate = rate or 0.0
                # Nothing is stored as long as the declared peak holds, so that a later stage of training, with a lower
                # peak of its own, is not measured by this one's.
                if rate > max(declared * (1 + ROUNDING), seen[i] * (1 + ROUNDING)):
                    seen[i], self._rose = _as_stored(rate), True
                self._now[id(parameter)] = group, rate, max(declared, seen[i])

    def of(self, parameter: torch.Tensor) -> tuple[float, float]:
        """(rate, peak rate) of a parameter; once the step is done, the rate is the one that it applied."""
        if id(parameter) not in self._now:
            return 0.0, 0.0
        group, rate, peak = self._now[id(parameter)]
        return float(group.get("scheduled_lr", rate)), peak

    def store(self, members: Sequence[AdapterTensors]) -> None:
        """Keep the peaks with the adapter, if they have risen."""
        if self._rose:
            seen = torch.tensor(self._seen, dtype=torch.float32)
            # Sent to a device once, not once for every layer.
            on_device = {device: seen.to(device) for device in {tensors.peaks.device for tensors in members}}
            values = [on_device[tensors.peaks.device][i] for i, tensors in enumerate(members)]
            write([tensors.peaks for tensors in members], values)
            self._rose = False


def _stored(members: Sequence[AdapterTensors]) -> list[list[float]]:
    """The stored peaks of each layer's tensors, read from a device once."""
    peaks = [tensors.peaks for tensors in members]
    if len({stored.device for stored in peaks}) == 1:
        return torch.stack(peaks).tolist()
    return [stored.tolist() for stored in peaks]


def _as_stored(rate: float) -> float:
    """A rate rounded to what the adapter can store: a resumed run must see the number that an unbroken one sees."""
    return torch.tensor(rate, dtype=torch.float32).item()
