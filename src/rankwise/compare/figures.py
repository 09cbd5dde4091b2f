"""The figures of a comparison's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rankwise.compare.results import Result
from rankwise.compare.spec import FLOORS
from rankwise.compare.summary import Row, at_best_rates, by_label, rate_curves, summarise
from rankwise.pages.draw import MOST_LINES, blank_rest, draw_spectra, heat_map, spectra_of
from rankwise.pages.places import grid_of, printable
from rankwise.pages.style import DASHES, MARKERS, PALETTE, WIDTH, Plot

# --- the methods as the figures show them ----------------------------------------------------------------------------

_LONGEST_NAME = 30


@dataclass(frozen=True)
class _Method:
    row: Row
    runs: list[Result]
    place: int  # decides colour, marker and dash, and is the same in every figure

    @property
    def name(self) -> str:
        label = printable(self.row.label)
        return label if len(label) <= _LONGEST_NAME else label[: _LONGEST_NAME - 1] + "…"

    @property
    def typical(self) -> Result:
        """The run with the median score, the lower of two."""
        return sorted(self.runs, key=lambda run: (run.quality, run.seed))[(len(self.runs) - 1) // 2]

    @property
    def colour(self) -> str:
        return PALETTE[self.place % len(PALETTE)]

    @property
    def marker(self) -> str:
        return MARKERS[self.place % len(MARKERS)]

    @property
    def dashes(self) -> str | tuple[float, tuple[float, float]]:
        return DASHES[self.place % len(DASHES)]


def _methods(results: Sequence[Result], reference: str | None) -> list[_Method]:
    """The methods, best first; the reference always has the first colour, the others theirs in the order of labels."""
    groups = by_label(at_best_rates(results))
    rows = summarise(results, reference)
    named = rows[0].reference
    in_order = sorted(groups, key=lambda label: (label != named, label))
    places = {label: place for place, label in enumerate(in_order)}
    return [_Method(row, groups[row.label], places[row.label]) for row in rows]


# --- the figures -----------------------------------------------------------------------------------------------------

_SMOOTHING = 25  # a running mean spans this part of a curve


def draw(results: Sequence[Result], metric: str, reference: str | None = None) -> list[Plot]:
    """Every figure of the page, in order; to be called and saved within matplotlib's `STYLE`."""
    methods = _methods(results, reference)
    # Floor and ceiling are lines in the figure of sizes: neither is an adapter. Only adapters with ranks have rank maps
    # and spectra.
    adapters = [method for method in methods if not method.row.is_floor and not method.row.is_ceiling]
    ranked = [method for method in adapters if method.typical.ranks]
    measured = [method for method in methods if method.typical.validation_curve]
    rows = [method.row for method in methods]
    plots = [
        _score_plot(methods, metric, rows),
        _rate_plot(methods, rate_curves(results), metric),
        _pareto_plot(adapters, metric, rows) if adapters else None,
        *(_rank_plots(ranked) if ranked else []),
        _curve_plot(methods, "Training loss", "training loss", lambda run: run.train_loss),
        _curve_plot(methods, "Gradient norm", "gradient norm before clipping", lambda run: run.gradient_norm),
        _curve_plot(measured, "Validation score", f"{metric} on the validation split", lambda run: run.validation_curve)
        if measured
        else None,
    ]
    return [plot for plot in plots if plot is not None]


def _rank_plots(methods: Sequence[_Method]) -> list[Plot | None]:
    """What there is to show of methods whose adapters have ranks."""
    return [
        _rank_plot(methods),
        _exported_rank_plot(methods),
        _spectra_plot(methods, relative=True),
        _spectra_plot(methods, relative=False),
    ]


def _draw_limits(draw_line: Callable[..., Any], rows: Sequence[Row]) -> str:
    """Draw the scores of the floor and of the ceiling as lines, and say so in sentences."""
    told = ""
    for row in rows:
        if row.is_floor:
            draw_line(row.score, color="#8a8a8a", linestyle="dashed", linewidth=1.2, zorder=1)
            told += f" The dashed line is the floor, {row.score:.3f}: {FLOORS[row.floor or '']}."
        if row.is_ceiling:
            draw_line(row.score, color="#8a8a8a", linestyle="dashdot", linewidth=1.2, zorder=1)
            told += f" The line of dashes and dots is the ceiling, {row.score:.3f}: every weight trained."
    return told


def _score_plot(methods: Sequence[_Method], metric: str, rows: Sequence[Row]) -> Plot:
    figure = Figure(figsize=(WIDTH, 1.2 + 0.36 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for height, method in enumerate(methods):
        scores = [run.score for run in method.runs]
        axes.plot(scores, [height] * len(scores), method.marker, color=method.colour, alpha=0.75, markersize=7)
        axes.vlines(method.row.score, height - 0.34, height + 0.34, color="#1a1a1a", linewidth=2.2)
    axes.set_yticks(range(len(methods)), [method.name for method in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set(title=f"{metric.capitalize()} by method", xlabel=f"{metric} on the test split", ylabel="method")
    caption = "One mark per seed; the bar is the median. The best method is on top."
    return Plot("Score by method", caption + _draw_limits(axes.axvline, rows), figure)


def _rate_plot(methods: Sequence[_Method], curves: Mapping[str, Mapping[float, float]], metric: str) -> Plot | None:
    """The search of the learning rates: a flat curve says that a method needs little tuning."""
    searched = [method for method in methods if method.row.label in curves]
    if not searched:
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    for method in searched:
        curve = curves[method.row.label]
        style = {"color": method.colour, "linestyle": method.dashes, "marker": method.marker}
        axes.plot(list(curve), list(curve.values()), label=method.name, **style)
        chosen = method.row.learning_rate
        axes.plot(chosen, curve[chosen], "o", color="none", markeredgecolor="#1a1a1a", markersize=14)
    axes.set_xscale("log")
    axes.set(title=f"{metric.capitalize()} by learning rate", xlabel="peak learning rate (log scale)", ylabel=metric)
    figure.legend(loc="outside right upper", frameon=False)
    caption = (
        f"{metric.capitalize()} on the validation split with the first seed, by the peak learning rate of the adapter. "
        "A ring is drawn round the rate that was chosen."
    )
    return Plot("Score by learning rate", caption, figure)


def _pareto_plot(methods: Sequence[_Method], metric: str, rows: Sequence[Row]) -> Plot:
    heading = "Score against size"
    sized = [method for method in methods if method.row.exported > 0]
    left_out = [f"{method.name} exports no parameters and is not drawn." for method in methods if method not in sized]
    if not sized:
        return Plot(heading, " ".join(left_out), None)
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    for method in sized:
        row = method.row
        axes.vlines(row.exported, row.lowest, row.highest, color=method.colour, alpha=0.6)
        style = {"color": method.colour, "markeredgecolor": "white", "markersize": 10, "linestyle": "none"}
        axes.plot(row.exported, row.score, method.marker, label=method.name, **style)
    front = _front([method.row for method in sized])
    sizes, scores = [row.exported for row in front], [row.score for row in front]
    axes.step(sizes, scores, where="post", color="#8a8a8a", linestyle="dotted", zorder=1, label="best at this size")
    # Wide enough that at least one of 1, 2, 5 × 10ⁿ is inside, and so has its label.
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.7, max(method.row.exported for method in sized) * 1.7)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: _compact(count)))
    axes.xaxis.set_minor_locator(NullLocator())
    xlabel = "exported adapter parameters (log scale)"
    axes.set(title=f"{metric.capitalize()} against exported parameters", xlabel=xlabel, ylabel=metric)
    figure.legend(loc="outside right upper", frameon=False)
    better = "Down" if sized[0].row.lower_is_better else "Up"
    caption = (
        f"Medians; a vertical line spans the seeds. {better} and to the left is better: no method lies beyond the "
        f"dotted line.{_draw_limits(axes.axhline, rows)}"
    )
    return Plot(heading, " ".join([caption, *left_out]), figure)


def _front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no smaller (or equally small) row beats, smallest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.exported, -row.quality)):
        if not front or row.quality > front[-1].quality:
            front.append(row)
    return front


def _compact(count: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return f"{count:g}"


def _rank_plot(methods: Sequence[_Method]) -> Plot | None:
    return _rank_maps(methods, "Ranks by layer and module", "kept", [method.typical.ranks for method in methods])


def _exported_rank_plot(methods: Sequence[_Method]) -> Plot | None:
    """The methods whose plain LoRA has other ranks than were kept, such as Deep LoRA, whose directions die out."""
    differing = [method for method in methods if method.typical.exported_ranks != method.typical.ranks]
    ranks = [method.typical.exported_ranks for method in differing]
    return _rank_maps(differing, "Ranks of the plain LoRA, where they differ", "exported", ranks)


def _rank_maps(methods: Sequence[_Method], heading: str, kind: str, ranks_of: Sequence[dict[str, int]]) -> Plot | None:
    """A heat map for each method whose modules differ in rank, and a sentence for each of the others.

    Args:
        methods: what to show.
        heading: of the section.
        kind: what sort of rank is shown: "kept" or "exported".
        ranks_of: for each method, the rank of each module.
    """
    if not methods:
        return None
    sentences = ["The run with the median score of each method."]
    uneven: list[tuple[_Method, dict[str, int]]] = []
    for method, ranks in zip(methods, ranks_of, strict=True):
        flat = _flat_ranks(ranks, kind)
        if flat:
            sentences.append(f"{method.name}: {flat}.")
        else:
            uneven.append((method, ranks))
    if not uneven:
        return Plot(heading, " ".join(sentences), None)
    grid = grid_of(name for _, ranks in uneven for name in ranks)
    top = max(max(ranks.values()) for _, ranks in uneven)
    across = 2 if len(grid.layers) <= 14 and len(uneven) > 1 else 1
    down = math.ceil(len(uneven) / across)
    figure = Figure(figsize=(WIDTH, down * (0.95 + 0.27 * len(grid.kinds))), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes, (method, ranks) in zip(panels.flat, uneven, strict=False):
        heat_map(axes, ranks, grid, top)
        axes.set_title(f"{kind.capitalize()} ranks: {method.name}")
    blank_rest(panels, len(uneven))
    for axes in panels[:, 1:].flat:
        axes.set(yticklabels=[], ylabel="")
    sentences.append(f"Each number is a module's {kind} rank; the colour runs from 0 to {top} in every panel.")
    return Plot(heading, " ".join(sentences), figure)


def _flat_ranks(ranks: dict[str, int], kind: str) -> str:
    """One line for ranks that are all equal, else nothing."""
    if not ranks:
        return "it adapts no module"
    if len(set(ranks.values())) > 1:
        return ""
    verb = {"kept": "keep", "exported": "are exported at"}[kind]
    return f"all {len(ranks)} modules {verb} rank {min(ranks.values())}"


def _spectra_plot(methods: Sequence[_Method], *, relative: bool) -> Plot:
    """The singular values of every module's update: relative to its largest (the shape), or as they are (the size)."""
    across = min(3, len(methods))
    down = math.ceil(len(methods) / across)
    figure = Figure(figsize=(WIDTH, 0.4 + 2.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, method in zip(panels.flat, methods, strict=False):
        draw_spectra(axes, spectra_of(method.typical.singular_values, relative=relative), method.colour)
        axes.set_title(method.name)
    for axes in panels[:, 0]:
        axes.set_ylabel("σᵢ / σ₁ (log scale)" if relative else "σᵢ (log scale)")
    blank_rest(panels, len(methods))
    heading = f"Singular values of the updates, {'relative' if relative else 'absolute'}"
    figure.suptitle(heading, fontsize=12)
    figure.supxlabel("index i of the singular value", fontsize=10)
    divided = ", divided by the module's largest value" if relative else ""
    caption = (
        f"The run with the median score of each method. One line per module{divided}; "
        "the black line is the median over the modules. Values of 0 or below 1e-8 of the largest are not drawn."
    )
    most = max(len(method.typical.singular_values) for method in methods)
    if most > MOST_LINES:
        caption += f" Lines are drawn for {MOST_LINES} modules, evenly spaced over the model; the median is over all."
    return Plot(heading, caption, figure)


def _curve_plot(
    methods: Sequence[_Method], heading: str, ylabel: str, curve: Callable[[Result], list[tuple[int, float]]]
) -> Plot:
    """A curve over training steps, one line for each method."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        steps, values = _smooth(curve(method.typical))
        axes.plot(steps, values, color=method.colour, linestyle=method.dashes, linewidth=1.7, label=method.name)
    axes.set(title=heading, xlabel="training step", ylabel=ylabel)
    figure.legend(loc="outside right upper", frameon=False)
    caption = f"The run with the median score of each method; running means over 1/{_SMOOTHING} of its points."
    return Plot(heading, caption, figure)


def _smooth(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    window = max(1, len(points) // _SMOOTHING)
    values = [value for _, value in points]
    means = [sum(values[end - window : end]) / window for end in range(window, len(points) + 1)]
    return [step for step, _ in points[window - 1 :]], means
