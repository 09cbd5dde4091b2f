"""Many finished runs as one row per candidate: medians, and differences to the reference seed by seed.

Candidates of one seed share their data, their batches and the start of their head. The difference of two candidates on
one seed is therefore less noisy than either score, and comparisons are made of such paired differences.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, wilcoxon

from rankwise.compare.results import Result
from rankwise.compare.spec import CEILING, FLOORS
from rankwise.errors import ArgumentError, DataError, nearest

REFERENCES = ("lora", "peft.LoraConfig")
"""What everything is compared with unless the SPEC says otherwise: the first of these labels that was run."""
SEEDS_TO_PAIR = 3
"""Common seeds below which no difference is reported."""
SEEDS_TO_CLAIM = 5
"""Common seeds below which a difference is no claim, and no test is made."""
SHARED_BY_ALL = ("model", "task", "metric", "data_digest")
"""What all results of one comparison have in common."""
SHARED_BY_LABEL = ("method", "fields", "steps", "batch_size", "head_learning_rate")
"""What, besides, all results with one label have in common."""
CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """A label's scores less the reference's, on the seeds that both have."""

    seeds: int
    """How many seeds both have."""
    wins: int
    """On how many of them the label is better; ties count for neither."""
    median_difference: float
    """Median of the differences, as scores are: below 0 is better where the metric is a loss."""
    interval: tuple[float, float]
    """95 % interval of that median: the percentiles of its bootstrap over the seeds (Efron 1979)."""
    p_value: float | None
    """Wilcoxon's signed-rank test, from five seeds on."""

    @property
    def is_apart(self) -> bool:
        """Whether there are seeds enough for a claim, and the interval leaves 0 out."""
        lowest, highest = self.interval
        return self.seeds >= SEEDS_TO_CLAIM and (lowest > 0 or highest < 0)


@dataclass(frozen=True)
class Row:
    """What a comparison says about one label.

    Numbers are medians over the label's seeds. `mean_rank`, `exported_mean_rank` and `starting_scale` are None for a
    candidate without an adapter, `forgetting` where no general text was given.
    """

    label: str
    seeds: int
    score: float
    lowest: float
    highest: float
    reference: str | None
    """The label that all others are compared with; None where it was not run."""
    versus_reference: Paired | None
    ratio_to_reference: float | None
    """Seconds of a step over the reference's."""
    initial: int
    final: int
    exported: int
    mean_rank: float | None
    exported_mean_rank: float | None
    forgetting: float | None
    seconds_per_step: float
    starting_scale: float | None
    learning_rate: float
    rate_searched: bool
    """Whether the learning rate was chosen among several on this data."""
    rate_at_edge: bool
    """Whether the best learning rate of the search was the least or the largest that was tried."""
    steps_skipped: int
    """Summed over the seeds."""
    unlearnt: int
    """Seeds whose training loss did not fall."""
    still_improving: int
    """Seeds whose score on the validation split was at its best at the end."""
    is_floor: bool
    is_ceiling: bool
    floor: str | None
    """The method that is the floor of the comparison; None where none was run."""
    above_floor: bool | None
    """Whether the median score is better than the floor's; None for the floor, and where none was run."""
    lower_is_better: bool

    @property
    def quality(self) -> float:
        """The median score, turned so that higher is better."""
        return -self.score if self.lower_is_better else self.score


def reference_among(labels: Iterable[str], asked: str | None = None) -> str | None:
    """The label that all others are compared with.

    Args:
        labels: what was run, or will be.
        asked: what the SPEC names; None for the first of REFERENCES that there is, if any.

    Raises:
        ArgumentError: there is no label as asked for.
    """
    labels = list(labels)
    if asked is None:
        return next((name for name in REFERENCES if name in labels), None)
    if asked not in labels:
        raise ArgumentError("reference", f"be the label of a method that is run ({nearest(asked, labels)})", asked)
    return asked


def rate_curves(results: Iterable[Result]) -> dict[str, dict[float, float]]:
    """Validation scores by learning rate, of every label whose rate was searched; rates rise.

    The search is what one seed ran at several rates.
    """
    found: dict[str, dict[float, float]] = {}
    for label, runs in _grouped(results).items():
        rates_of_seed: dict[int, dict[float, float]] = defaultdict(dict)
        for run in runs:
            rates_of_seed[run.seed][run.learning_rate] = run.validation_score
        widest = max(rates_of_seed.values(), key=len)
        if len(widest) > 1:
            found[label] = dict(sorted(widest.items()))
    return found


def best_rates(results: Iterable[Result]) -> dict[str, float]:
    """The learning rate of every label: the one it ran at, or the one with the best validation score of its search."""
    results = list(results)
    curves = rate_curves(results)
    found: dict[str, float] = {}
    for label, runs in _grouped(results).items():
        sign = -1 if runs[0].lower_is_better else 1
        curve = curves.get(label, {runs[0].learning_rate: 0.0})
        found[label] = max(curve, key=lambda rate: sign * curve[rate])
    return found


def at_best_rates(results: Iterable[Result]) -> list[Result]:
    """The runs that a comparison is about: those at the rate that was chosen for their label."""
    results = list(results)
    best = best_rates(results)
    return [result for result in results if result.learning_rate == best[result.label]]


def by_label(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each label, by seed.

    Raises:
        DataError: there are two runs of one label with one seed.
    """
    results = list(results)
    label_and_seed = Counter((result.label, result.seed) for result in results)
    for (label, seed), count in label_and_seed.items():
        if count > 1:
            raise DataError(f"there must be one run of {label!r} with seed {seed}; found {count}")
    return _grouped(results)


def _grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda result: (result.label, result.seed)):
        groups[result.label].append(result)
    return dict(groups)


def summarise(
    results: Sequence[Result], reference: str | None = None, rates: Mapping[str, Sequence[float]] | None = None
) -> list[Row]:
    """One row per label, best median score first, at the rate that was chosen for it.

    Args:
        results: finished runs of one comparison.
        reference: the label that all others are compared with; None for plain LoRA, where it was run.
        rates: for each label, the learning rates that were to be tried, of which some may have failed; None for those
            that the results have.

    Raises:
        DataError: there are two runs of one label with one seed and one rate, or runs that do not belong together.
        ArgumentError: no run has the label of the reference.
    """
    _check_belonging(results)
    curves = rate_curves(results)
    tried = {label: tuple(curve) for label, curve in curves.items()} | dict(rates or {})
    groups = by_label(at_best_rates(results))
    named = reference_among(groups, reference)
    floor = next((runs for runs in groups.values() if runs[0].method in FLOORS), [])
    rows = [
        _row(runs, named, groups.get(named or "", []), floor, tried.get(label, ())) for label, runs in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row.quality, row.label))


def _check_belonging(results: Sequence[Result]) -> None:
    """Refuse to compare what differs in more than the method: runs of several SPECs may lie in one folder."""
    _check_shared(results, SHARED_BY_ALL, "one comparison")
    for label, runs in _grouped(results).items():
        _check_shared(runs, SHARED_BY_LABEL, f"the runs of {label}")


def _check_shared(runs: Sequence[Result], names: Iterable[str], whose: str) -> None:
    for name in names:
        values = list(dict.fromkeys(str(getattr(run, name)) for run in runs))
        if len(values) > 1:
            raise DataError(f"{whose} must have one {name}; found results with several: {', '.join(values)}")


def _row(
    runs: list[Result],
    reference: str | None,
    reference_runs: list[Result],
    floor: list[Result],
    tried: Sequence[float],
) -> Row:
    scores = [run.score for run in runs]
    quality = statistics.median(run.quality for run in runs)
    is_floor = runs[0].method in FLOORS
    above_floor = None
    if floor and not is_floor:
        above_floor = quality > statistics.median(run.quality for run in floor)
    paired = None
    if runs[0].label != reference and not is_floor:
        paired = _paired(runs, reference_runs)
    seconds = _median_seconds(runs)
    reference_seconds = _median_seconds(reference_runs)
    return Row(
        label=runs[0].label,
        seeds=len(runs),
        score=statistics.median(scores),
        lowest=min(scores),
        highest=max(scores),
        reference=reference,
        versus_reference=paired,
        ratio_to_reference=seconds / reference_seconds if reference_seconds else None,
        initial=_median_count([run.parameters["initial"] for run in runs]),
        final=_median_count([run.parameters["final"] for run in runs]),
        exported=_median_count([run.parameters["exported"] for run in runs]),
        mean_rank=_median_or_none([run.mean_rank for run in runs]),
        exported_mean_rank=_median_or_none([_mean(run.exported_ranks) for run in runs]),
        forgetting=_median_or_none([run.forgetting for run in runs]),
        seconds_per_step=seconds,
        starting_scale=runs[0].starting_scale,
        learning_rate=runs[0].learning_rate,
        rate_searched=len(tried) > 1,
        rate_at_edge=len(tried) > 1 and runs[0].learning_rate in (min(tried), max(tried)),
        steps_skipped=sum(run.steps_skipped for run in runs),
        unlearnt=sum(not run.has_learnt for run in runs),
        still_improving=sum(run.still_improving for run in runs),
        is_floor=is_floor,
        is_ceiling=runs[0].method == CEILING,
        floor=floor[0].method if floor else None,
        above_floor=above_floor,
        lower_is_better=runs[0].lower_is_better,
    )


def _paired(runs: Sequence[Result], reference: Sequence[Result]) -> Paired | None:
    """The differences to the reference on common seeds; None where there are too few."""
    score_of_seed = {run.seed: run.score for run in reference}
    # Rounded, since the test ranks the differences and 0.82 - 0.81 must tie with 0.92 - 0.91.
    differences = [round(run.score - score_of_seed[run.seed], 12) for run in runs if run.seed in score_of_seed]
    if len(differences) < SEEDS_TO_PAIR:
        return None
    better = -1 if runs[0].lower_is_better else 1
    return Paired(
        seeds=len(differences),
        wins=sum(better * difference > 0 for difference in differences),
        median_difference=statistics.median(differences),
        interval=_interval(differences),
        p_value=_p_value(differences),
    )


def _interval(differences: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap of the median, by a fixed generator: the same results give the same interval."""
    drawn: Any = bootstrap(
        (np.asarray(differences),),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval = drawn.confidence_interval
    return float(interval.low), float(interval.high)


def _p_value(differences: Sequence[float]) -> float | None:
    if len(differences) < SEEDS_TO_CLAIM:
        return None
    if not any(differences):
        return 1.0  # the test itself is undefined where nothing differs
    outcome: Any = wilcoxon(differences)
    return float(outcome.pvalue)


def _mean(ranks: Mapping[str, int]) -> float | None:
    return statistics.fmean(ranks.values()) if ranks else None


def _median_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _median_count(counts: Sequence[int]) -> int:
    return round(statistics.median(counts))


def _median_seconds(runs: Sequence[Result]) -> float:
    return statistics.median(run.seconds_per_step for run in runs) if runs else 0.0
