"""The figures of a comparison's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rankwise.compare.places import Grid, grid_of, printable
from rankwise.compare.results import Result
from rankwise.compare.spec import FLOORS
from rankwise.compare.summary import Row, at_best_rates, by_label, rate_curves, summarise

# --- the methods as the figures show them ----------------------------------------------------------------------------

# Paul Tol's "muted" scheme: nine colours that stay apart under the common forms of colour blindness. Markers and
# dashes repeat what the colour says.
_PALETTE = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933")
_MARKERS = "oDs^vPX<>"
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1)))
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
        return _PALETTE[self.place % len(_PALETTE)]

    @property
    def marker(self) -> str:
        return _MARKERS[self.place % len(_MARKERS)]

    @property
    def dashes(self) -> str | tuple[float, tuple[float, float]]:
        return _DASHES[self.place % len(_DASHES)]


def _methods(results: Sequence[Result], reference: str | None) -> list[_Method]:
    """The methods, best first; the reference always has the first colour, the others theirs in the order of labels."""
    groups = by_label(at_best_rates(results))
    rows = summarise(results, reference)
    named = rows[0].reference
    in_order = sorted(groups, key=lambda label: (label != named, label))
    places = {label: place for place, label in enumerate(in_order)}
    return [_Method(row, groups[row.label], places[row.label]) for row in rows]


# --- the figures -----------------------------------------------------------------------------------------------------

_WIDTH = 11.0  # inches; 1056 CSS pixels
_MOST_LINES = 36
_NEGLIGIBLE = 1e-8  # of the largest singular value
_SMOOTHING = 25  # a running mean spans this part of a curve
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    # Verdana has the widths of DejaVu Sans, by which the figure was laid out.
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "text.color": "#1a1a1a",
    "text.parse_math": False,  # a label with two dollar signs is no formula
    "svg.fonttype": "none",
    "svg.hashsalt": "rankwise",  # the same results give the same page
}


@dataclass(frozen=True)
class Plot:
    """One figure with its heading and caption; no figure where the caption says it all."""

    heading: str
    caption: str
    figure: Figure | None


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
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.36 * len(methods)), layout="constrained")
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
    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
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
    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
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
    figure = Figure(figsize=(_WIDTH, down * (0.95 + 0.27 * len(grid.kinds))), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes, (method, ranks) in zip(panels.flat, uneven, strict=False):
        _heat_map(axes, ranks, grid, top)
        axes.set_title(f"{kind.capitalize()} ranks: {method.name}")
    _blank_rest(panels, len(uneven))
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


def _heat_map(axes: Axes, ranks: dict[str, int], grid: Grid, top: int) -> None:
    kinds, layers = grid.kinds, grid.layers
    values = np.full((len(kinds), len(layers)), np.nan)
    for name, rank in ranks.items():
        kind, layer = grid.places[name]
        values[kinds.index(kind), layers.index(layer)] = rank
    axes.pcolormesh(values, cmap="Blues", vmin=0, vmax=top, edgecolors="white", linewidth=0.5)
    size = min(9.0, 330 / len(layers))
    for (row, column), rank in np.ndenumerate(values):
        if not math.isnan(rank):
            colour = "white" if rank > 0.6 * top else "#1a1a1a"
            axes.text(column + 0.5, row + 0.5, f"{rank:.0f}", ha="center", va="center", fontsize=size, color=colour)
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
    stride = 1 + len(layers) // 40
    axes.set_xticks([column + 0.5 for column in range(len(layers))][::stride], layers[::stride])
    axes.set(xlabel="layer", ylabel="module", ylim=(len(kinds), 0))
    axes.grid(visible=False)
    axes.tick_params(length=0)


def _spectra_plot(methods: Sequence[_Method], *, relative: bool) -> Plot:
    """The singular values of every module's update: relative to its largest (the shape), or as they are (the size)."""
    across = min(3, len(methods))
    down = math.ceil(len(methods) / across)
    figure = Figure(figsize=(_WIDTH, 0.4 + 2.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, method in zip(panels.flat, methods, strict=False):
        _draw_spectra(axes, _spectra(method.typical, relative=relative), method.colour)
        axes.set_title(method.name)
    for axes in panels[:, 0]:
        axes.set_ylabel("σᵢ / σ₁ (log scale)" if relative else "σᵢ (log scale)")
    _blank_rest(panels, len(methods))
    heading = f"Singular values of the updates, {'relative' if relative else 'absolute'}"
    figure.suptitle(heading, fontsize=12)
    figure.supxlabel("index i of the singular value", fontsize=10)
    divided = ", divided by the module's largest value" if relative else ""
    caption = (
        f"The run with the median score of each method. One line per module{divided}; "
        "the black line is the median over the modules. Values of 0 or below 1e-8 of the largest are not drawn."
    )
    most = max(len(method.typical.singular_values) for method in methods)
    if most > _MOST_LINES:
        caption += f" Lines are drawn for {_MOST_LINES} modules, evenly spaced over the model; the median is over all."
    return Plot(heading, caption, figure)


def _spectra(result: Result, *, relative: bool) -> np.ndarray:
    """The singular values, one row per module that has an update, largest first and 0 where there is none."""
    longest = max(map(len, result.singular_values.values()), default=0)
    rows = [
        sorted(values, reverse=True) + [0.0] * (longest - len(values)) for values in result.singular_values.values()
    ]
    spectra = np.array([row for row in rows if row and row[0] > 0], dtype=float).reshape(-1, longest)
    shares = spectra / spectra[:, :1]
    return np.where(shares > _NEGLIGIBLE, shares if relative else spectra, 0.0)


def _draw_spectra(axes: Axes, spectra: np.ndarray, colour: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    if not len(spectra):
        axes.text(0.5, 0.5, "no update", transform=axes.transAxes, ha="center", va="center")
        return
    # An invisible line a power of ten below the top: flat spectra then still have two labelled powers in view.
    axes.axhline(spectra.max() / 10, alpha=0)
    shown = np.unique(np.linspace(0, len(spectra) - 1, _MOST_LINES).round().astype(int))
    for values in spectra[shown]:
        _draw_values(axes, values, color=colour, linewidth=0.8, alpha=0.55)
    _draw_values(axes, np.median(spectra, axis=0), color="#1a1a1a", linewidth=2.2)


def _draw_values(axes: Axes, values: np.ndarray, **style: Any) -> None:
    kept = values[values > 0]
    axes.plot(np.arange(1, len(kept) + 1), kept, marker="." if len(kept) == 1 else None, **style)


def _curve_plot(
    methods: Sequence[_Method], heading: str, ylabel: str, curve: Callable[[Result], list[tuple[int, float]]]
) -> Plot:
    """A curve over training steps, one line for each method."""
    figure = Figure(figsize=(_WIDTH, 4.4), layout="constrained")
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


def _blank_rest(panels: np.ndarray, used: int) -> None:
    """Hides the panels of a grid that are left over; the panel above each one then has to show its own tick labels."""
    across, grid = panels.shape[1], list(panels.flat)
    for place in range(used, len(grid)):
        grid[place].set_axis_off()
        grid[place - across].tick_params(labelbottom=True)
