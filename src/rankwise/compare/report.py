"""What a comparison found: a table for the terminal, one for README files, and a page of plots.

The page is one file that needs no network and no script. Its figures are SVG drawn by matplotlib, which works without a
display and keeps a page small; they are drawn through the Figure class, never pyplot, which keeps global state.
"""

from __future__ import annotations

import html
import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich import box
from rich.table import Table
from rich.text import Text

from rankwise.compare.results import REFERENCE, Result, Row, by_label, summarise, write_whole
from rankwise.errors import DataError

# --- the table, in three forms ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    heading: str
    help: str
    cell: Callable[[Row], str]


def _columns(rows: Sequence[Row], metric: str) -> list[_Column]:
    columns = [
        _Column(
            "method", "the method, and what was set for it where that tells two entries apart", lambda row: row.label
        ),
        _Column(metric, "on the test split, median over the seeds, higher is better", lambda row: f"{row.score:.3f}"),
        _Column("spread", "lowest and highest score over the seeds", lambda row: f"{row.lowest:.3f}–{row.highest:.3f}"),
        _Column("initial", "adapter parameters at the start, without the task head", lambda row: f"{row.initial:,}"),
        _Column("final", "adapter parameters the method kept", lambda row: f"{row.final:,}"),
        _Column("exported", "parameters of the plain LoRA that is shipped", lambda row: f"{row.exported:,}"),
        _Column("mean rank", "kept rank, mean over the modules", lambda row: f"{row.mean_rank:.1f}"),
        _Column(
            "s/step", "seconds of one training step, median", lambda row: f"{row.seconds_per_step:#.3g}".rstrip(".")
        ),
        _Column("× LoRA", f"seconds per step over those of {REFERENCE} in this comparison", _ratio),
    ]
    several_seeds = any(row.seeds > 1 for row in rows)
    return [column for column in columns if several_seeds or column.heading != "spread"]


def _ratio(row: Row) -> str:
    return "–" if row.ratio_to_lora is None else f"{row.ratio_to_lora:.2f}"


def table(rows: Sequence[Row], metric: str) -> Table:
    """The comparison as a table for the terminal; it fits 80 columns unless a label is long, which then wraps."""
    columns = _columns(rows, metric)
    shown = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    shown.add_column(Text(columns[0].heading), overflow="fold", min_width=9)
    for column in columns[1:]:
        shown.add_column(Text(column.heading), justify="right", no_wrap=column.heading not in {"mean rank", "× LoRA"})
    for row in rows:
        # As Text: a label in square brackets is no markup.
        shown.add_row(*(Text(column.cell(row)) for column in columns))
    return shown


def markdown(rows: Sequence[Row], metric: str) -> str:
    """The comparison as a Markdown table, for README files."""
    columns = _columns(rows, metric)
    lines = [[column.heading for column in columns], [":---", *["---:"] * (len(columns) - 1)]]
    lines += [[_markdown_cell(column.cell(row)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _markdown_cell(text: str) -> str:
    return _escape(text).replace("|", "\\|")


def _html_table(rows: Sequence[Row], metric: str) -> str:
    columns = _columns(rows, metric)
    head = "".join(f'<th scope="col">{_escape(column.heading)}</th>' for column in columns)
    body = "\n".join(f"<tr>{_html_cells(row, columns)}</tr>" for row in rows)
    helps = "; ".join(f"<b>{_escape(column.heading)}</b>: {_escape(column.help)}" for column in columns)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n'
        f'<p class="note">{helps}.</p>'
    )


def _html_cells(row: Row, columns: Sequence[_Column]) -> str:
    first, *others = (_escape(column.cell(row)) for column in columns)
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others)


def _escape(text: str) -> str:
    return html.escape(_printable(text))


def _printable(text: str) -> str:
    """Without control characters, which neither HTML nor SVG may hold."""
    return "".join(character if character.isprintable() else " " for character in text)


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
        label = _printable(self.row.label)
        return label if len(label) <= _LONGEST_NAME else label[: _LONGEST_NAME - 1] + "…"

    @property
    def typical(self) -> Result:
        """The run with the median score, the lower of two."""
        return sorted(self.runs, key=lambda run: (run.score, run.seed))[(len(self.runs) - 1) // 2]

    @property
    def colour(self) -> str:
        return _PALETTE[self.place % len(_PALETTE)]

    @property
    def marker(self) -> str:
        return _MARKERS[self.place % len(_MARKERS)]

    @property
    def dashes(self) -> str | tuple[float, tuple[float, float]]:
        return _DASHES[self.place % len(_DASHES)]


def _methods(results: Sequence[Result]) -> list[_Method]:
    """The methods, best first; the reference always has the first colour, the others theirs in the order of labels."""
    groups = by_label(results)
    places = {label: place for place, label in enumerate(sorted(groups, key=lambda label: (label != REFERENCE, label)))}
    return [_Method(row, groups[row.label], places[row.label]) for row in summarise(results)]


# --- the figures -----------------------------------------------------------------------------------------------------

_WIDTH = 11.0  # inches; 1056 CSS pixels
_MOST_LINES = 36
_NEGLIGIBLE = 1e-8  # of the largest singular value
_SMOOTHING = 25  # a running mean spans this part of a curve
_STYLE: dict[Any, Any] = {
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
class _Plot:
    heading: str
    caption: str
    figure: Figure | None


def _score_plot(methods: Sequence[_Method], metric: str) -> _Plot:
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.36 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for height, method in enumerate(methods):
        scores = [run.score for run in method.runs]
        axes.plot(scores, [height] * len(scores), method.marker, color=method.colour, alpha=0.75, markersize=7)
        axes.vlines(method.row.score, height - 0.34, height + 0.34, color="#1a1a1a", linewidth=2.2)
    axes.set_yticks(range(len(methods)), [method.name for method in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set(title=f"{metric.capitalize()} by method", xlabel=f"{metric} on the test split", ylabel="method")
    return _Plot("Score by method", "One mark per seed; the bar is the median. The best method is on top.", figure)


def _pareto_plot(methods: Sequence[_Method], metric: str) -> _Plot:
    heading = "Score against size"
    sized = [method for method in methods if method.row.exported > 0]
    left_out = [f"{method.name} exports no parameters and is not drawn." for method in methods if method not in sized]
    if not sized:
        return _Plot(heading, " ".join(left_out), None)
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
    caption = (
        "Medians; a vertical line spans the seeds. Up and to the left is better: no method lies beyond the dotted line."
    )
    return _Plot(heading, " ".join([caption, *left_out]), figure)


def _front(rows: Sequence[Row]) -> list[Row]:
    """The rows that no smaller (or equally small) row beats, smallest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.exported, -row.score)):
        if not front or row.score > front[-1].score:
            front.append(row)
    return front


def _compact(count: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return f"{count:g}"


def _rank_plot(methods: Sequence[_Method]) -> _Plot:
    heading, uneven = "Ranks by layer and module", []
    sentences = ["The run with the median score of each method."]
    for method in methods:
        flat = _flat_ranks(method.typical.ranks)
        sentences.append(f"{method.name}: {flat}." if flat else "")
        uneven += [] if flat else [method]
    if not uneven:
        return _Plot(heading, " ".join(filter(None, sentences)), None)
    grid = _grid(name for method in uneven for name in method.typical.ranks)
    top = max(max(method.typical.ranks.values()) for method in uneven)
    across = 2 if len(grid.layers) <= 14 and len(uneven) > 1 else 1
    down = math.ceil(len(uneven) / across)
    figure = Figure(figsize=(_WIDTH, down * (0.95 + 0.27 * len(grid.kinds))), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes, method in zip(panels.flat, uneven, strict=False):
        _heat_map(axes, method.typical.ranks, grid, top)
        axes.set_title(f"Kept ranks: {method.name}")
    _blank_rest(panels, len(uneven))
    for axes in panels[:, 1:].flat:
        axes.set(yticklabels=[], ylabel="")
    sentences.append(f"Each number is a module's kept rank; the colour runs from 0 to {top} in every panel.")
    return _Plot(heading, " ".join(filter(None, sentences)), figure)


def _flat_ranks(ranks: dict[str, int]) -> str:
    """One line for ranks that are all equal, else nothing."""
    if not ranks:
        return "it adapts no module"
    return f"all {len(ranks)} modules keep rank {min(ranks.values())}" if len(set(ranks.values())) == 1 else ""


@dataclass(frozen=True)
class _Grid:
    """The rows and columns of a heat map, and each module's kind and layer."""

    places: dict[str, tuple[str, str]]
    kinds: list[str]
    layers: list[str]


def _heat_map(axes: Axes, ranks: dict[str, int], grid: _Grid, top: int) -> None:
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


def _grid(names: Iterable[str]) -> _Grid:
    """A place for every module: kinds in model order, layers by number and "-" last."""
    places = _places(names)
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    numbers = sorted({int(layer) for _, layer in places.values() if layer != "-"})
    without = ["-"] if any(layer == "-" for _, layer in places.values()) else []
    return _Grid(places, kinds, [*map(str, numbers), *without])


def _places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The kind and the layer of each module: its layer is the first integer in its path, "-" where there is none.

    >>> _places(["encoder.layer.3.attention.self.query", "pooler.dense"])
    {'encoder.layer.3.attention.self.query': ('attention.self.query', '3'), 'pooler.dense': ('pooler.dense', '-')}
    """
    split = {name: _split(name) for name in names}
    # An encoder and a decoder hold modules of one kind and layer; then the kind needs the path before the layer too.
    several_stacks = len({before for before, layer, _ in split.values() if layer != "-"}) > 1
    return {name: (_kind(*parts, several_stacks), parts[1]) for name, parts in split.items()}


def _split(name: str) -> tuple[str, str, str]:
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return name, "-", ""
    return ".".join(parts[:first]), str(int(parts[first])), ".".join(parts[first + 1 :])


def _kind(before: str, layer: str, after: str, several_stacks: bool) -> str:
    if layer == "-":
        return _printable(before)
    parts = (before, "*", after) if several_stacks or not after else (after,)
    return _printable(".".join(filter(None, parts)))


def _spectra_plot(methods: Sequence[_Method]) -> _Plot:
    across = min(3, len(methods))
    down = math.ceil(len(methods) / across)
    figure = Figure(figsize=(_WIDTH, 0.4 + 2.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, method in zip(panels.flat, methods, strict=False):
        _draw_spectra(axes, _spectra(method.typical), method.colour)
        axes.set_title(method.name)
    for axes in panels[:, 0]:
        axes.set_ylabel("σᵢ / σ₁ (log scale)")
    _blank_rest(panels, len(methods))
    figure.suptitle("Singular values of the updates", fontsize=12)
    figure.supxlabel("index i of the singular value", fontsize=10)
    caption = (
        "The run with the median score of each method. One line per module, divided by the module's largest value; "
        "the black line is the median over the modules. Values of 0 or below 1e-8 of the largest are not drawn."
    )
    most = max(len(method.typical.singular_values) for method in methods)
    if most > _MOST_LINES:
        caption += f" Lines are drawn for {_MOST_LINES} modules, evenly spaced over the model; the median is over all."
    return _Plot("Singular values of the updates", caption, figure)


def _spectra(result: Result) -> np.ndarray:
    """The relative singular values, one row per module that has an update, largest first and 0 where there is none."""
    longest = max(map(len, result.singular_values.values()), default=0)
    rows = [
        sorted(values, reverse=True) + [0.0] * (longest - len(values)) for values in result.singular_values.values()
    ]
    spectra = np.array([row for row in rows if row and row[0] > 0], dtype=float).reshape(-1, longest)
    relative = spectra / spectra[:, :1]
    return np.where(relative > _NEGLIGIBLE, relative, 0.0)


def _draw_spectra(axes: Axes, spectra: np.ndarray, colour: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(0.1, alpha=0)  # invisible; keeps a labelled power of ten besides 1 in view when the spectra are flat
    if not len(spectra):
        axes.text(0.5, 0.5, "no update", transform=axes.transAxes, ha="center", va="center")
        return
    shown = np.unique(np.linspace(0, len(spectra) - 1, _MOST_LINES).round().astype(int))
    for values in spectra[shown]:
        _draw_values(axes, values, color=colour, linewidth=0.8, alpha=0.55)
    _draw_values(axes, np.median(spectra, axis=0), color="#1a1a1a", linewidth=2.2)


def _draw_values(axes: Axes, values: np.ndarray, **style: Any) -> None:
    kept = values[values > 0]
    axes.plot(np.arange(1, len(kept) + 1), kept, marker="." if len(kept) == 1 else None, **style)


def _loss_plot(methods: Sequence[_Method]) -> _Plot:
    figure = Figure(figsize=(_WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    for method in methods:
        steps, losses = _smooth(method.typical.train_loss)
        axes.plot(steps, losses, color=method.colour, linestyle=method.dashes, linewidth=1.7, label=method.name)
    axes.set(title="Training loss", xlabel="training step", ylabel="training loss")
    figure.legend(loc="outside right upper", frameon=False)
    caption = f"The run with the median score of each method; running means over 1/{_SMOOTHING} of its points."
    return _Plot("Training loss", caption, figure)


def _smooth(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    window = max(1, len(points) // _SMOOTHING)
    losses = [loss for _, loss in points]
    means = [sum(losses[end - window : end]) / window for end in range(window, len(points) + 1)]
    return [step for step, _ in points[window - 1 :]], means


def _blank_rest(panels: np.ndarray, used: int) -> None:
    """Hides the panels of a grid that are left over; the panel above each one then has to show its own tick labels."""
    across, grid = panels.shape[1], list(panels.flat)
    for place in range(used, len(grid)):
        grid[place].set_axis_off()
        grid[place - across].tick_params(labelbottom=True)


# --- the page --------------------------------------------------------------------------------------------------------

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")

_CSS = """
:root { color-scheme: light; }
body { max-width: 1056px; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: 1rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h1, td, th, dd, li, figcaption { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: #555; }
dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #ddd; font-weight: normal; }
thead th { border-bottom: 2px solid #1a1a1a; font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
th:first-child { text-align: left; }
.note, figcaption { color: #555; font-size: .9rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
"""


def write_page(results: Sequence[Result], path: str | Path, title: str) -> Path:
    """Writes the comparison as one self-contained HTML page, whole or not at all, and returns where it is.

    The results must be of one comparison: the same model, task and metric, and one run per label and seed.
    """
    _check_one_comparison(results)
    path, metric = Path(path), results[0].metric
    with matplotlib.rc_context(_STYLE):
        methods = _methods(results)
        plots = [
            _score_plot(methods, metric),
            _pareto_plot(methods, metric),
            _rank_plot(methods),
            _spectra_plot(methods),
            _loss_plot(methods),
        ]
        figures = "\n".join(_section(plot, place) for place, plot in enumerate(plots, start=1))
    rows = [method.row for method in methods]
    facts = "\n".join(f"<dt>{_escape(name)}</dt><dd>{_escape(fact)}</dd>" for name, fact in _facts(results, rows))
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{_escape(title)}</h1>\n"
        f"<dl>\n{facts}\n</dl>\n<h2>Results</h2>\n{_html_table(rows, metric)}\n{_notes(rows)}\n{figures}\n"
        f"</body>\n</html>\n"
    )
    write_whole(path, page)
    return path


def _check_one_comparison(results: Sequence[Result]) -> None:
    if not results:
        raise DataError("there are no finished runs to report on")
    for name in ("model", "task", "metric"):
        values = _distinct(getattr(result, name) for result in results)
        if len(values) > 1:
            raise DataError(
                f"one page shows one comparison; found results of several kinds of {name}: {', '.join(values)}"
            )


def _facts(results: Sequence[Result], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was run, as names and values."""
    packages = _distinct(f"{name} {version}" for result in results for name, version in result.versions.items())
    return [
        ("Model", results[0].model),
        ("Task", results[0].task),
        ("Steps", _joined(result.steps for result in results)),
        ("Batch size", _joined(result.batch_size for result in results)),
        ("Learning rate", _by_value([(f"{row.learning_rate:g}", row.label) for row in rows])),
        ("Starting scale", _by_value([(f"{row.starting_scale:g}", row.label) for row in rows])),
        ("Seeds", ", ".join(map(str, sorted({result.seed for result in results})))),
        (
            "Task head",
            f"{_joined(f'{result.head_parameters:,}' for result in results)} parameters, counted in no column",
        ),
        ("Command", _joined(result.command for result in results)),
        ("Versions", ", ".join(packages)),
        ("Machine", _joined(result.machine for result in results)),
    ]


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values))


def _joined(values: Iterable[object]) -> str:
    return "; ".join(_distinct(values))


def _by_value(values_and_labels: Sequence[tuple[str, str]]) -> str:
    """One value where all labels share it, else each value with its labels."""
    values = _distinct(value for value, _ in values_and_labels)
    if len(values) == 1:
        return values[0]
    labels = {value: [label for other, label in values_and_labels if other == value] for value in values}
    return "; ".join(f"{value} ({', '.join(labels[value])})" for value in values)


def _notes(rows: Sequence[Row]) -> str:
    """What the table has no column for: comparisons with plain LoRA on common seeds, and skipped steps."""
    notes = [_paired_note(row) for row in rows if row.versus_lora]
    notes += [f"{row.label}: steps skipped over all seeds: {row.steps_skipped}" for row in rows if row.steps_skipped]
    items = "\n".join(f"<li>{_escape(note)}</li>" for note in notes)
    return f'<ul class="note">\n{items}\n</ul>' if notes else ""


def _paired_note(row: Row) -> str:
    paired = row.versus_lora
    assert paired is not None
    known = paired.p_value is not None
    test = f"Wilcoxon signed-rank p = {paired.p_value:.2g}" if known else "too few seeds for a test"
    return (
        f"{row.label} against {REFERENCE} on {paired.seeds} common seeds: "
        f"median difference {paired.median_difference:+z.3f}, {test}"
    )


def _section(plot: _Plot, place: int) -> str:
    heading, caption = _escape(plot.heading), _escape(plot.caption)
    if plot.figure is None:
        return f"<section>\n<h2>{heading}</h2>\n<p>{caption}</p>\n</section>"
    svg = _inline_svg(plot.figure, f"f{place}-", f"{plot.heading}. {plot.caption}")
    return f"<section>\n<h2>{heading}</h2>\n<figure>\n{svg}\n<figcaption>{caption}</figcaption>\n</figure>\n</section>"


def _inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an element of an HTML page, its ids made unique among the page's figures."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    for unneeded in (*root.findall(f"{{{_SVG}}}metadata"), *root.findall(f"{{{_SVG}}}defs[{{{_SVG}}}style]")):
        root.remove(unneeded)  # its links are foreign to a page without a network; its style is in the page's
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, _renamed(name, value, prefix))
    root.set("role", "img")
    root.set("aria-label", _printable(description))
    return ET.tostring(root, encoding="unicode")


def _renamed(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == _XLINK:
        return value.replace("#", f"#{prefix}", 1)
    return value.replace("url(#", f"url(#{prefix}")
