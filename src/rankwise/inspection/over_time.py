"""The figures of an adapter over its training, from records or checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankwise.inspection.answer import QUESTIONS, Answer, median, plural, share
from rankwise.pages.draw import plain_log_axis
from rankwise.pages.places import grid_of, printable
from rankwise.pages.style import DASHES, PALETTE, WIDTH, Plot
from rankwise.spectral import LayerRecord, Measured, Record, subspace_alignment

TIME = QUESTIONS[6]
OPEN = 1e-12
"""Gates up to this size count as closed."""
MOST_KINDS = 12
"""Lines of the figure of kinds: those that end with the highest ranks."""


def answers_over_time(history: Sequence[Measured]) -> list[Answer]:
    """All figures of an adapter over its training.

    Args:
        history: at least one look at the adapter, in the order of steps.
    """
    records = [measured.record for measured in history]
    if len(records) == 1:
        sentence = f"There is one record only, of step {records[0].step}: nothing to draw over time."
        return [Answer(TIME, "over-time", Plot("Over the training", sentence, None))]
    drawn = [_ranks(records), _kinds(records), _norms(records), _use(records), _conditions(records)]
    aligned = _alignment(history)
    gates = _gates(records)
    drift = _drift(records)
    return [answer for answer in (*drawn, aligned, gates, drift) if answer is not None]


def _ranks(records: Sequence[Record]) -> Answer:
    """Kept and effective ranks over all modules, and the schedule's budget."""
    steps = [record.step for record in records]
    kept = [sum(layer.kept for layer in record.modules.values()) for record in records]
    effective = [sum(layer.effective_rank for layer in record.modules.values()) for record in records]
    figure, axes = _panel("Ranks over all modules", "ranks")
    axes.plot(steps, kept, color=PALETTE[0], label="kept", drawstyle="steps-post")
    axes.plot(steps, effective, color=PALETTE[1], linestyle=DASHES[1], label="effective")
    budgets = [record.budget for record in records]
    if any(budget is not None for budget in budgets):
        numbers = [np.nan if budget is None else budget for budget in budgets]
        axes.plot(steps, numbers, color="#1a1a1a", linestyle=DASHES[2], label="budget")
    axes.set_ylim(bottom=0)
    axes.legend()
    sentence = (
        f"From step {steps[0]} to {steps[-1]} the kept ranks went from {kept[0]} to {kept[-1]}, and the ranks that "
        f"the updates use from {effective[0]:.0f} to {effective[-1]:.0f}."
    )
    rows = [list(row) for row in zip(steps, kept, effective, budgets, strict=True)]
    columns = ("step", "kept_ranks", "effective_ranks", "budget")
    return Answer(TIME, "ranks-over-time", Plot("Ranks over time", sentence, figure), columns, rows)


def _kinds(records: Sequence[Record]) -> Answer:
    """The mean kept rank of each kind of module."""
    grid = grid_of(records[0].modules)
    steps = [record.step for record in records]
    curves: dict[str, list[float]] = {}
    for kind in grid.kinds:
        names = [name for name, (own, _) in grid.places.items() if own == kind]
        curves[kind] = [float(np.mean([record.modules[name].kept for name in names])) for record in records]
    ends = {kind: means[-1] for kind, means in curves.items()}
    figure, axes = _panel("Mean kept rank by kind of module", "rank")
    # A model without layer numbers has a kind for each module, too many for a legend.
    shown = set(sorted(ends, key=lambda kind: -ends[kind])[:MOST_KINDS])
    for place, kind in enumerate(kind for kind in grid.kinds if kind in shown):
        colour, dashes = PALETTE[place % len(PALETTE)], DASHES[place % len(DASHES)]
        axes.plot(steps, curves[kind], color=colour, linestyle=dashes, label=kind)
    rows = [[kind, step, mean] for kind, means in curves.items() for step, mean in zip(steps, means, strict=True)]
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", frameon=False)
    most, least = max(ends, key=lambda kind: ends[kind]), min(ends, key=lambda kind: ends[kind])
    if ends[most] == ends[least]:
        sentence = f"All kinds of modules end at a mean rank of {ends[most]:.1f}."
    else:
        sentence = (
            f"{printable(most)} ends with the highest mean rank ({ends[most]:.1f}), {printable(least)} with the "
            f"lowest ({ends[least]:.1f})."
        )
    plot = Plot("Ranks by kind of module over time", sentence, figure)
    return Answer(TIME, "kinds-over-time", plot, ("kind", "step", "mean_kept_rank"), rows)


def _norms(records: Sequence[Record]) -> Answer:
    spread = _spread(records, lambda layer: layer.norm)
    figure, axes = _panel("‖ΔW‖_F of the modules", "‖ΔW‖_F")
    _draw_spread(axes, spread, PALETTE[0])
    first, last = spread.medians[0], spread.medians[-1]
    sentence = f"The median module's update grew from ‖ΔW‖ = {first:.3g} to {last:.3g}. {_BAND}"
    return _over_time("norms-over-time", "Size of the updates over time", sentence, figure, spread)


def _use(records: Sequence[Record]) -> Answer:
    spread = _spread(records, lambda layer: layer.subspace_use)
    figure, axes = _panel("Subspace use ‖ΔW‖_*/(√r·‖ΔW‖_F)", "subspace use")
    _draw_spread(axes, spread, PALETTE[0])
    axes.set_ylim(0, 1.02)
    moved = [value for value in spread.medians if value > 0]
    first, last = (moved[0], moved[-1]) if moved else (0.0, 0.0)
    more = "more evenly" if last > first else "less evenly"
    sentence = (
        f"Subspace use went from {first:.2f} to {last:.2f} in the median module, from its first update on: the "
        f"directions are used {more} at the end. {_BAND}"
    )
    return _over_time("use-over-time", "Subspace use over time", sentence, figure, spread)


def _conditions(records: Sequence[Record]) -> Answer:
    """Condition numbers of the trained product and its factors."""
    steps = [record.step for record in records]
    kinds: Mapping[str, Callable[[LayerRecord], float | None]] = {
        "product W_p": lambda layer: layer.condition_of_product,
        "left factor U_p": lambda layer: layer.condition_of_left,
        "right factor V_p": lambda layer: layer.condition_of_right,
    }
    figure, axes = _panel("Condition numbers, median over the modules", "κ (log scale)")
    plain_log_axis(axes)
    curves: dict[str, list[float]] = {}
    for place, (name, number) in enumerate(kinds.items()):
        finite = [[k for k in map(number, record.modules.values()) if k is not None] for record in records]
        curves[name] = [median(values) if values else float("nan") for values in finite]
        axes.plot(steps, curves[name], color=PALETTE[place], linestyle=DASHES[place % len(DASHES)], label=name)
    axes.legend()
    ends = ", ".join(f"{name} {values[-1]:.3g}" for name, values in curves.items())
    sentence = f"At step {steps[-1]} the condition numbers σ_max/σ_min of the median module are: {ends}."
    rows = [list(row) for row in zip(steps, *curves.values(), strict=True)]
    plot = Plot("Condition numbers over time", sentence, figure)
    return Answer(TIME, "conditions-over-time", plot, ("step", *curves), rows)


def _alignment(history: Sequence[Measured]) -> Answer | None:
    """How much of the leading directions is shared with the first and with the last look."""
    looks = [measured for measured in history if measured.directions and _has_moved(measured)]
    if len(looks) < 2:
        return None
    steps = [measured.record.step for measured in looks]
    with_first = [_shared(measured, looks[0]) for measured in looks]
    with_last = [_shared(measured, looks[-1]) for measured in looks]
    figure, axes = _panel("Alignment of the leading directions, median over the modules", "alignment")
    axes.plot(steps, with_first, color=PALETTE[0], marker=".", label=f"with step {steps[0]}")
    axes.plot(steps, with_last, color=PALETTE[1], marker=".", linestyle=DASHES[1], label=f"with step {steps[-1]}")
    axes.set_ylim(0, 1.02)
    axes.legend()
    k = max(directions.U.shape[1] for directions in looks[-1].directions.values())
    sentence = (
        f"The {k} leading directions at step {steps[0]} share {with_last[0]:.2f} of their subspace with those at step "
        f"{steps[-1]}, and halfway {with_last[len(looks) // 2]:.2f} is shared (1: the subspace no longer turns)."
    )
    rows = [list(row) for row in zip(steps, with_first, with_last, strict=True)]
    plot = Plot("Subspaces over time", sentence, figure)
    return Answer(TIME, "alignment-over-time", plot, ("step", "with_first", "with_last"), rows)


def _has_moved(measured: Measured) -> bool:
    """Whether there is an update at all: directions of zeros are arbitrary."""
    return any(layer.norm > 0 for layer in measured.record.modules.values())


def _shared(one: Measured, other: Measured) -> float:
    """The alignment of two looks, mean of both sides, median over the modules that have an update in both."""
    shared: list[float] = []
    for name, mine in one.directions.items():
        theirs = other.directions[name]
        moved = one.record.modules[name].norm > 0 and other.record.modules[name].norm > 0
        if moved:
            sides = subspace_alignment(mine.U, theirs.U) + subspace_alignment(mine.V, theirs.V)
            shared.append(float(sides) / 2)
    return median(shared)


def _gates(records: Sequence[Record]) -> Answer | None:
    """The gates of a method that has some; None where each module's are all alike."""
    has_gates = any(len(set(layer.gates)) > 1 for record in records for layer in record.modules.values())
    if not has_gates:
        return None
    steps = [record.step for record in records]
    values = [np.abs(np.concatenate([layer.gates for layer in record.modules.values()])) for record in records]
    lines = {part: [float(np.quantile(gates, part)) for gates in values] for part in (0.1, 0.25, 0.5, 0.75, 0.9)}
    figure, axes = _panel("Gates |s| over all ranks: quantiles", "|s|")
    for place, (part, quantiles) in enumerate(lines.items()):
        colour, dashes = PALETTE[place], DASHES[place % len(DASHES)]
        axes.plot(steps, quantiles, color=colour, linestyle=dashes, label=f"{part:.0%} quantile")
    figure.legend(loc="outside right upper", frameon=False)
    closed = int((values[-1] <= OPEN).sum())
    sentence = (
        f"At step {steps[-1]}, {closed} of {plural(len(values[-1]), 'gate')} are closed "
        f"({share(closed, len(values[-1]))}); the median |s| went from {lines[0.5][0]:.3g} to {lines[0.5][-1]:.3g}."
    )
    rows = [list(row) for row in zip(steps, *lines.values(), strict=True)]
    columns = ("step", *(f"quantile_{part}" for part in lines))
    return Answer(TIME, "gates-over-time", Plot("Gates over time", sentence, figure), columns, rows)


def _drift(records: Sequence[Record]) -> Answer | None:
    """ΔΣ_t against ΔD_t, a line for each module; None where it was not recorded."""
    names = [name for name, layer in records[-1].modules.items() if layer.pretrained is not None]
    if not names:
        return None
    figure, axes = _panel("ΔΣ_t against ΔD_t, a line for each module", "ΔΣ_t")
    axes.set_xlabel("ΔD_t")
    rows: list[list[object]] = []
    for name in names:
        measured = [(record.step, record.modules[name].pretrained) for record in records]
        points = [(step, weight.drift_vectors, weight.drift_values) for step, weight in measured if weight is not None]
        axes.plot(
            [vectors for _, vectors, _ in points],
            [values for _, _, values in points],
            color=PALETTE[0],
            marker=".",
            linewidth=0.8,
            alpha=0.6,
        )
        rows += [[name, *point] for point in points]
    last = [layer.pretrained for layer in records[-1].modules.values() if layer.pretrained is not None]
    sentence = (
        f"At step {records[-1].step} the median module has ΔD = {median([w.drift_vectors for w in last]):.2g} and "
        f"ΔΣ = {median([w.drift_values for w in last]):.2g} over the {last[0].top_k} leading triplets."
    )
    plot = Plot("Drift from the pretrained weights over time", sentence, figure)
    return Answer(TIME, "drift-over-time", plot, ("module", "step", "drift_vectors", "drift_values"), rows)


# --- what they share -------------------------------------------------------------------------------------------------

_BAND = "The band holds the middle 80 % of the modules."


class _Spread:
    """A number of every module over time: its median and the middle 80 %."""

    def __init__(self, steps: list[int], values: np.ndarray) -> None:
        self.steps = steps
        self.low, self.medians, self.high = (np.quantile(values, q, axis=1).tolist() for q in (0.1, 0.5, 0.9))


def _spread(records: Sequence[Record], number: Callable[[LayerRecord], float]) -> _Spread:
    values = np.array([[number(layer) for layer in record.modules.values()] for record in records], dtype=float)
    return _Spread([record.step for record in records], values)


def _draw_spread(axes: Axes, spread: _Spread, colour: str) -> None:
    axes.fill_between(spread.steps, spread.low, spread.high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(spread.steps, spread.medians, color=colour)


def _over_time(name: str, heading: str, sentence: str, figure: Figure, spread: _Spread) -> Answer:
    rows = [list(row) for row in zip(spread.steps, spread.low, spread.medians, spread.high, strict=True)]
    columns = ("step", "tenth_percentile", "median", "ninetieth_percentile")
    return Answer(TIME, name, Plot(heading, sentence, figure), columns, rows)


def _panel(title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel="training step", ylabel=ylabel)
    return figure, axes
