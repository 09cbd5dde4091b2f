"""A differentially private weighted sum of adapters: how far one adapter can move it, and the noise that hides that.

Replacing one adapter, whose whole update has Frobenius norm at most b, by another such moves Σ w_i ΔW_i by at most
Δ = 2·max_i |w_i|·b over all modules together. The analytic Gaussian mechanism (Balle and Wang, "Improving the Gaussian
Mechanism for Differential Privacy", 2018) adds N(0, σ²) to every entry, with the smallest σ for which

    Φ(Δ/2σ − εσ/Δ) − e^ε·Φ(−Δ/2σ − εσ/Δ) ≤ δ.

The noise is dense: noise within the span of the merged factors would leave that span, which is data, in the open.
Truncation comes after and costs nothing. Attacks on floating-point samplers (Mironov, 2012) are not warded off.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import Tensor, nn

from rankwise.checks import require_number
from rankwise.errors import ArgumentError, RankwiseError
from rankwise.export.adapter import FROZEN, Adapter, TrainedAdapter
from rankwise.export.base import formats_of
from rankwise.export.lora_config import CHOOSING_MODULES
from rankwise.export.lora_format import LoraFormat
from rankwise.linalg.svd import leading_triplets, leading_triplets_full
from rankwise.methods import METHODS
from rankwise.update import Factors

UNBOUNDED = "be given unless all adapters are of one method that bounds their norms by construction (NB-LoRA)"
ROUNDING = 1e-6
"""By how much a bounded update may exceed its bound in float32; it is scaled back by that."""
FULL = 1024
"""Modules with no more rows or columns are decomposed in full: noise has a flat spectrum, hard for a sketch."""


@dataclass(frozen=True)
class Guarantee:
    """What a private merge promises, and what it costs."""

    epsilon: float
    delta: float
    weights: tuple[float, ...]
    bound: float
    """b: the largest Frobenius norm of one adapter's whole update."""
    origin: str
    """Where b comes from."""
    sensitivity: float
    sigma: float
    """The noise's standard deviation per entry."""
    noise: dict[str, float]
    """√(out·in)·σ of each module, which the norm of its noise is close to."""
    signal: float
    """‖Σ w_i ΔW_i‖_F before the noise. For whoever merges: publishing it is not covered, nor is `noise_to_signal`."""
    seeded: bool
    """Whether the noise came from a given seed, so that nothing is guaranteed."""

    @property
    def noise_to_signal(self) -> float:
        """The norm of all noise over `signal`."""
        return math.hypot(*self.noise.values()) / self.signal if self.signal else math.inf

    def text(self) -> str:
        """The guarantee and its assumptions, in public figures only, for the README.md beside a private merge."""
        n, noise = len(self.weights), math.hypot(*self.noise.values())
        largest = self.bound * sum(abs(w) for w in self.weights)
        if self.seeded:
            holds = "**No guarantee**: the noise came from a given seed, and whoever knows it can subtract the noise."
        else:
            holds = (
                f"This merge is ({self.epsilon:g}, {self.delta:g})-differentially private: replacing any one of the "
                f"{n} adapters by any other changes the probability of any set of results by no more than a factor "
                f"e^{self.epsilon:g} and {self.delta:g}."
            )
        useless = "\nThe noise exceeds whatever the merge can hold: it is of no use.\n" if noise > largest else ""
        return f"""## A private merge of {n} adapters

{holds}

- Mechanism: analytic Gaussian (Balle and Wang, 2018), dense noise on every entry of every adapted module, then
  truncation; adjacency: one adapter replaced.
- Weights: {", ".join(f"{w:g}" for w in self.weights)}.
- Norm of one adapter's whole update: at most {self.bound:.6g}, by {self.origin}.
- Sensitivity 2·max|w|·{self.bound:.6g} = {self.sensitivity:.6g}; σ = {self.sigma:.6g} per entry.
- Norm of the noise before truncation: about {noise:.4g} over {len(self.noise)} modules; of the merge without it: at
  most {largest:.4g}.
{useless}
Assumed: the weights, rank, base model, modules, bound and (ε, δ) were chosen without a look at the adapters' data.
An adapter stands for all data it was trained on. Not covered: several releases from the same adapters, whose ε and δ
add up; what one of them says elsewhere; attacks on floating-point sampling of noise.
"""


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0) -> float:
    """The smallest σ with Φ(Δ/2σ − εσ/Δ) − e^ε·Φ(−Δ/2σ − εσ/Δ) ≤ δ, to 1e-9 of itself and never below.

    Raises:
        ArgumentError: ε or Δ is not above 0, or δ not in (0, 1).

    >>> round(gaussian_sigma(1.0, 1e-5), 4)
    3.7306
    """
    require_number("epsilon", epsilon, least=1e-300)
    require_number("delta", delta, least=1e-300, below=1.0)
    require_number("sensitivity", sensitivity, least=1e-300)

    def excess(log_x: float) -> float:
        return _log_delta(epsilon, math.exp(log_x)) - math.log(delta)

    ends = [0.0, 0.0]
    while excess(ends[1]) > 0:
        ends[1] += 1
    while excess(ends[0]) <= 0:
        ends[0] -= 1
    root: Any = brentq(excess, *ends, xtol=1e-13)
    return sensitivity * math.exp(root) * (1 + 1e-9)


def _log_delta(epsilon: float, x: float) -> float:
    """The logarithm of the left side for σ = x·Δ; of its first term alone where they are too close to tell apart."""
    first = float(log_ndtr(0.5 / x - epsilon * x))
    second = epsilon + float(log_ndtr(-0.5 / x - epsilon * x))
    return first + math.log(-math.expm1(second - first)) if second < first else first


def sensitivity(weights: Sequence[float], bound: float) -> float:
    """2·max_i |w_i|·b: how far one adapter replaced by another of norm at most b moves the weighted sum."""
    return 2 * max(abs(w) for w in weights) * bound


def private_merge(
    adapters: Sequence[Adapter],
    weights: tuple[float, ...],
    model: nn.Module,
    privacy: tuple[float, float],
    clip: float | None,
    rank: int,
    seed: int | None,
) -> tuple[Adapter, Guarantee, float]:
    """What may be published, its guarantee, and the error of its truncation.

    Raises:
        RankwiseError: the adapters differ in what they adapt, train modules in full, or have no common bound that is
            proven.
    """
    for adapter in adapters:
        head = next((key for key in adapter.others if FROZEN not in key), None)
        if head:
            raise RankwiseError(f"a private merge holds updates of bounded norm, and {head!r} is trained in full")
    formats, names = formats_of(model)
    found, guarantee, truncation = private_sum(adapters, weights, model, formats, privacy, clip, rank, seed)
    if guarantee.noise_to_signal > 1:
        warnings.warn(
            f"this merge is useless: its noise is {guarantee.noise_to_signal:.3g} times what it merges", stacklevel=3
        )
    # The config holds nothing of an adapter's but what all share.
    own = adapters[0].config
    config = {key: own.get(key) for key in ("task_type", "base_model_name_or_path", "revision")}
    merged = Adapter(config=config, updates=found, others={}, formats=formats, names=names)
    return merged, guarantee, truncation


def private_sum(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    model: nn.Module,
    formats: Mapping[str, LoraFormat],
    privacy: tuple[float, float],
    clip: float | None,
    rank: int,
    seed: int | None,
) -> tuple[dict[str, Factors], Guarantee, float]:
    """Σ w_i ΔW_i + N, privacy = (ε, δ), on every module that the common config adapts, each truncated to `rank`.

    `formats` are of the base `model`, which needs weights only where bounds are relative to them. The third result is
    the share of the noisy sum's norm that truncation left out.

    Raises:
        RankwiseError: the adapters differ in what they adapt, or have no common bound that is proven.
    """
    modules = _public_modules(adapters, formats)
    if clip is None:
        bounds = _proven_bounds(adapters, modules, model)
        bound, origin = math.hypot(*bounds.values()), "construction, from the config all adapters share"
        limited = [{name: _limited(f, bounds[name], name) for name, f in a.updates.items()} for a in adapters]
    else:
        bound, origin = clip, "clipping: each adapter's whole update was scaled down to that norm"
        limited = [_clipped(a.updates, clip) for a in adapters]
    moved = sensitivity(weights, bound)
    sigma = gaussian_sigma(*privacy, moved)
    draw = os.urandom if seed is None else random.Random(seed).randbytes
    found: dict[str, Factors] = {}
    signal = whole = captured = 0.0
    for name, shape in modules.items():
        W = torch.zeros(shape, dtype=torch.float64)
        for w, updates in zip(weights, limited, strict=True):
            if name in updates:
                W += w * Factors(*(t.double() for t in updates[name])).delta()
        signal += float(W.square().sum())
        W += gaussian(shape, sigma, draw)
        lead = leading_triplets_full if min(shape) <= FULL else leading_triplets
        found[name] = lead(W, min(rank, *shape)).factors
        whole, captured = whole + float(W.square().sum()), captured + float(found[name].s.square().sum())
    noise = {name: math.prod(shape) ** 0.5 * sigma for name, shape in modules.items()}
    promise = Guarantee(*privacy, tuple(weights), bound, origin, moved, sigma, noise, signal**0.5, seed is not None)
    return found, promise, max(0.0, 1 - captured / whole) ** 0.5


def gaussian(shape: tuple[int, int], sigma: float, draw: Callable[[int], bytes] = os.urandom) -> Tensor:
    """N(0, σ²) entries in float64, by the inverse distribution function, from `draw(n)`: n random bytes."""
    bits = torch.frombuffer(bytearray(draw(8 * math.prod(shape))), dtype=torch.int64) & ((1 << 52) - 1)
    return torch.special.ndtri((bits.double() + 0.5) * 2.0**-52).reshape(shape) * sigma


def _public_modules(adapters: Sequence[Adapter], formats: Mapping[str, LoraFormat]) -> dict[str, tuple[int, int]]:
    """(out, in) of every module the common config adapts: told by config and base model, whatever the files hold."""
    _check_common(adapters, (*CHOOSING_MODULES, "modules_to_save", "task_type"))
    own = adapters[0].config
    choosing: dict[str, Any] = {field: own.get(field) for field in CHOOSING_MODULES}
    config = peft.LoraConfig(**choosing)
    modules = {name: form.shape for name, form in formats.items() if check_target_module_exists(config, name)}
    for adapter in adapters:
        for name in adapter.updates:
            if adapter.formats[name].shape != modules.get(name):
                raise RankwiseError(
                    f"an adapter holds an update of module {name!r} with shape {adapter.formats[name].shape}, and by "
                    f"its config and base model it should be {modules.get(name, 'none')}"
                )
    return modules


def _check_common(adapters: Sequence[Adapter], entries: Sequence[str]) -> None:
    """Raise `RankwiseError` unless all configs agree on these entries."""
    for adapter in adapters:
        for name in entries:
            one, other = (_comparable(config.get(name)) for config in (adapters[0].config, adapter.config))
            if one != other:
                raise RankwiseError(f"a private merge needs adapters of one config: `{name}` is {one!r} and {other!r}")


def _comparable(value: object) -> object:
    return sorted(value) if isinstance(value, list | set | tuple) else value or None


def _proven_bounds(adapters: Sequence[Adapter], modules: Mapping[str, tuple[int, int]], model: Any) -> dict[str, float]:
    """δ_l of every module, the same for every adapter, by the construction of the method they share."""
    first, whole = adapters[0], model
    if not isinstance(first, TrainedAdapter):
        raise ArgumentError("clip", UNBOUNDED, None)
    config = first.method
    own_fields = (field.name for field in fields(METHODS[config.method]))  # type: ignore[arg-type]  all are dataclasses
    _check_common(adapters, ("peft_type", "r", "rank_pattern", *own_fields))
    if config.starts_from_weight and any(t.is_meta for t in whole.parameters()):
        name, revision = whole.name_or_path, first.config.get("revision")
        whole = type(whole).from_pretrained(name, revision=revision or "main")
    layers = dict(whole.named_modules())
    bounds: dict[str, float] = {}
    for name, shape in modules.items():
        size = config.size_of(name, *shape)
        bound = config.norm_bound(size, lambda name=name: layers[name].weight.detach().float())
        if bound is None:
            raise ArgumentError("clip", UNBOUNDED, None)
        bounds[name] = bound
    return bounds


def _limited(f: Factors, bound: float, name: str) -> Factors:
    norm = float(f.singular_values().norm())
    if norm > bound * (1 + ROUNDING):
        raise RankwiseError(
            f"{name!r} has an update of norm {norm:.6g}, above the {bound:.6g} that its config promises: another base?"
        )
    return f if norm <= bound else Factors(f.B, f.s.double() * (bound / norm), f.A)


def _clipped(updates: Mapping[str, Factors], clip: float) -> dict[str, Factors]:
    norm = math.hypot(*(float(f.singular_values().norm()) for f in updates.values()))
    return {name: Factors(f.B, f.s.double() * min(1.0, clip / max(norm, clip)), f.A) for name, f in updates.items()}
