"""One finished run as a file, and many finished runs as one row per method.

A result file is strict JSON (no NaN) and is written whole or not at all, so that several machines can fill one folder
and a crash leaves only runs that are really done.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from scipy.stats import wilcoxon

from rankwise.compare.spec import FLOORS
from rankwise.errors import DataError
from rankwise.files import write_whole

FORMAT = 3
REFERENCE = "lora"
_SEEDS_TO_PAIR = 3
_SEEDS_TO_TEST = 5


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run: what was run, how well it did, and what it cost.

    `score` is the `metric` on the test split; `lower_is_better` says which way it goes. `parameters` counts the adapter
    without the task head and has the keys initial, final and exported. `ranks` (what the method kept), `exported_ranks`
    (what the plain LoRA holds) and `singular_values` are by module name, and empty for a candidate without an adapter.
    `export` is the folder of the plain LoRA, relative to the output folder. `train_loss` and `gradient_norm` are
    (step, value) as the Trainer logged them, where they are finite; `diverged` says that a loss was not. The norm is
    taken over everything that trains, before clipping.
    """

    method: str
    label: str
    seed: int
    model: str
    task: str
    learning_rate: float
    head_learning_rate: float
    steps: int
    batch_size: int
    fields: dict[str, Any]
    metric: str
    lower_is_better: bool
    score: float
    validation_score: float
    extra_metrics: dict[str, float]
    train_loss: list[tuple[int, float]]
    diverged: bool
    gradient_norm: list[tuple[int, float]]
    parameters: dict[str, int]
    head_parameters: int
    mean_rank: float | None
    initial_mean_rank: float | None
    starting_scale: float | None
    ranks: dict[str, int]
    exported_ranks: dict[str, int]
    singular_values: dict[str, list[float]]
    seconds_per_step: float
    seconds: float
    steps_skipped: int
    export: str | None
    versions: dict[str, str]
    machine: str
    command: str

    def to_dict(self) -> dict[str, Any]:
        """The content of the result file."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Result:
        """The result that a file's content describes; content of another shape raises `DataError`."""
        if content.get("format") != FORMAT:
            raise DataError(f"a result has format {FORMAT}; found {content.get('format')!r}")
        hints = get_type_hints(cls)
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in content]
        if missing:
            raise DataError(f"a result needs {', '.join(missing)}")
        for name in names:
            if not _fits(content[name], hints[name]):
                raise DataError(f"`{name}` of a result must be {_spoken(hints[name])}; found {content[name]!r:.60}")
        if not {"initial", "final", "exported"} <= content["parameters"].keys():
            seen = ", ".join(content["parameters"])
            raise DataError(
                f"`parameters` of a result must have initial, final and exported; found {seen or 'nothing'}"
            )
        # JSON has no tuples: the points of a curve come back as lists.
        curves: dict[str, Any] = {
            name: [(step, value) for step, value in content[name]] for name in ("train_loss", "gradient_norm")
        }
        return cls(**{name: content[name] for name in names} | curves)

    @property
    def quality(self) -> float:
        """The score, turned so that higher is better."""
        return -self.score if self.lower_is_better else self.score

    @property
    def validation_quality(self) -> float:
        """The validation score, turned so that higher is better: what rates are chosen by."""
        return -self.validation_score if self.lower_is_better else self.validation_score

    @property
    def has_learnt(self) -> bool:
        """Whether the training loss stayed finite and ended below where it began.

        Both ends are means over a tenth of what was logged. A single logged loss tells nothing, and counts as learnt.
        """
        if self.diverged:
            return False
        losses = [loss for _, loss in self.train_loss]
        window = max(1, len(losses) // 10)
        if len(losses) < 2:
            return True
        return statistics.fmean(losses[-window:]) < statistics.fmean(losses[:window])


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is what a field's type says (JSON writes tuples as lists, and 1.0 as 1)."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return value is None or _fits(value, inner[0])
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if hint is bool:
        return isinstance(value, bool)
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and not isinstance(value, bool)


def _spoken(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return f"{_spoken(get_args(hint)[0])} or null"
    names = {
        str: "text",
        int: "an integer",
        float: "a number",
        bool: "true or false",
        dict: "an object",
        list: "a list",
    }
    return names[get_origin(hint) or hint]


def write_result(result: Result, path: str | Path) -> None:
    """Writes one finished run as strict JSON, whole or not at all; a number that is not finite raises `DataError`."""
    path = Path(path)
    try:
        text = json.dumps(result.to_dict(), indent=1, allow_nan=False)
    except ValueError as error:
        raise DataError(f"the result for {path.name} holds a number that is not finite") from error
    write_whole(path, text + "\n")


def read_results(folder: str | Path, keys: Iterable[str] | None = None) -> list[Result]:
    """The results in a folder, by label and then seed: all, or those whose file names without `.json` are `keys`.

    A file that is not a whole result raises `DataError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder of results at {folder}")
    paths = sorted(folder.glob("*.json")) if keys is None else [folder / f"{key}.json" for key in keys]
    results = [_read_result(path) for path in paths]
    return sorted(results, key=lambda result: (result.label, result.seed))


def _read_result(path: Path) -> Result:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise DataError(f"{path} is truncated or not strict JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a rankwise result: it holds no JSON object")
    try:
        return Result.from_dict(content)
    except DataError as error:
        raise DataError(f"{path} is not a rankwise result: {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@dataclass(frozen=True)
class Paired:
    """A label's scores against plain LoRA's on the seeds both have; `p_value` (Wilcoxon) needs five of them."""

    seeds: int
    median_difference: float
    p_value: float | None


@dataclass(frozen=True)
class Row:
    """What a comparison says about one label: medians over its seeds, and `steps_skipped` summed over them.

    `mean_rank`, `exported_mean_rank` and `starting_scale` are None for a candidate without an adapter. `floor` is the
    method that is the floor of the comparison, if it was run, and `above_floor` tells whether the median score is
    better than the floor's; None where no floor was run. `unlearnt` counts the seeds whose training loss did not fall.
    `rate_at_edge` says that the best learning rate of the search was the least or the largest that was tried.
    """

    label: str
    seeds: int
    score: float
    lowest: float
    highest: float
    versus_lora: Paired | None
    initial: int
    final: int
    exported: int
    mean_rank: float | None
    exported_mean_rank: float | None
    seconds_per_step: float
    ratio_to_lora: float | None
    starting_scale: float | None
    learning_rate: float
    steps_skipped: int
    is_floor: bool
    floor: str | None
    above_floor: bool | None
    unlearnt: int
    lower_is_better: bool
    rate_at_edge: bool

    @property
    def quality(self) -> float:
        """The median score, turned so that higher is better."""
        return -self.score if self.lower_is_better else self.score


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


def _grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda result: (result.label, result.seed)):
        groups[result.label].append(result)
    return dict(groups)


def summarise(results: Sequence[Result]) -> list[Row]:
    """One row per label, best median score first, at the rate that was chosen for it.

    Two runs of one label with one seed and one rate raise `DataError`.
    """
    curves = rate_curves(results)
    groups = by_label(at_best_rates(results))
    reference = groups.get(REFERENCE, [])
    floor = next((groups[name] for name in FLOORS if name in groups), [])
    rows = [_row(runs, reference, floor, curves.get(label, {})) for label, runs in groups.items()]
    return sorted(rows, key=lambda row: (-row.quality, row.label))


def by_label(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each label, by seed; two runs of one label with one seed raise `DataError`."""
    results = list(results)
    label_and_seed = Counter((result.label, result.seed) for result in results)
    for (label, seed), count in label_and_seed.items():
        if count > 1:
            raise DataError(f"there must be one run of {label!r} with seed {seed}; found {count}")
    return _grouped(results)


def _row(runs: list[Result], reference: list[Result], floor: list[Result], curve: dict[float, float]) -> Row:
    scores = [run.score for run in runs]
    score = statistics.median(scores)
    is_floor = runs[0].method in FLOORS
    quality = statistics.median(run.quality for run in runs)
    floor_quality = statistics.median(run.quality for run in floor) if floor and not is_floor else None
    seconds, lora_seconds = _median_seconds(runs), _median_seconds(reference)
    return Row(
        label=runs[0].label,
        seeds=len(runs),
        score=score,
        lowest=min(scores),
        highest=max(scores),
        versus_lora=_paired(runs, reference),
        initial=_median_count(runs, "initial"),
        final=_median_count(runs, "final"),
        exported=_median_count(runs, "exported"),
        mean_rank=_median_or_none([run.mean_rank for run in runs]),
        exported_mean_rank=_median_or_none([_mean(run.exported_ranks) for run in runs]),
        seconds_per_step=seconds,
        ratio_to_lora=seconds / lora_seconds if lora_seconds else None,
        starting_scale=runs[0].starting_scale,
        learning_rate=runs[0].learning_rate,
        steps_skipped=sum(run.steps_skipped for run in runs),
        is_floor=is_floor,
        floor=floor[0].method if floor else None,
        above_floor=None if floor_quality is None else quality > floor_quality,
        unlearnt=sum(not run.has_learnt for run in runs),
        lower_is_better=runs[0].lower_is_better,
        rate_at_edge=bool(curve) and runs[0].learning_rate in (min(curve), max(curve)),
    )


def _mean(ranks: Mapping[str, int]) -> float | None:
    return statistics.fmean(ranks.values()) if ranks else None


def _median_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _median_count(runs: list[Result], kind: str) -> int:
    return round(statistics.median(run.parameters[kind] for run in runs))


def _median_seconds(runs: list[Result]) -> float:
    return statistics.median(run.seconds_per_step for run in runs) if runs else 0.0


def _paired(runs: list[Result], reference: list[Result]) -> Paired | None:
    if runs[0].label == REFERENCE or runs[0].method in FLOORS:
        return None
    lora = {run.seed: run.score for run in reference}
    # Rounded, since the test ranks the differences and 0.82 - 0.81 must tie with 0.92 - 0.91.
    differences = [round(run.score - lora[run.seed], 12) for run in runs if run.seed in lora]
    if len(differences) < _SEEDS_TO_PAIR:
        return None
    return Paired(len(differences), statistics.median(differences), _p_value(differences))


def _p_value(differences: list[float]) -> float | None:
    if len(differences) < _SEEDS_TO_TEST:
        return None
    if not any(differences):
        return 1.0  # the test itself is undefined where nothing differs
    outcome: Any = wilcoxon(differences)
    return float(outcome.pvalue)
