"""What a comparison found: a table for the terminal, one for README files, and a page of plots.

The page is one file that needs no network and no script; `rankwise.pages` has its look.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from rich import box
from rich.table import Table
from rich.text import Text

from rankwise.compare.figures import draw
from rankwise.compare.notes import notes
from rankwise.compare.results import Result
from rankwise.compare.summary import REFERENCES, Row, summarise
from rankwise.errors import DataError
from rankwise.files import write_whole
from rankwise.pages.page import escape, fact_list, section, whole_page, wide_table
from rankwise.pages.places import printable
from rankwise.pages.style import STYLE

# --- the table, in three forms ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    heading: str
    help: str
    cell: Callable[[Row], str]


def _columns(rows: Sequence[Row], metric: str) -> list[_Column]:
    better = "lower" if rows[0].lower_is_better else "higher"
    reference = rows[0].reference
    columns = [
        _Column("method", "the method, and what was set for it where that tells two entries apart", _name),
        _Column(
            metric, f"on the test split, median over the seeds, {better} is better", lambda row: f"{row.score:.3f}"
        ),
        _Column("spread", "lowest and highest score over the seeds", lambda row: f"{row.lowest:.3f}–{row.highest:.3f}"),
        _Column(
            "initial", "adapter parameters at the start, without the task head", lambda row: _count(row, "initial")
        ),
        _Column("final", "adapter parameters the method kept", lambda row: _count(row, "final")),
        _Column(
            "exported",
            "parameters of the plain LoRA, each module at its own rank",
            lambda row: _count(row, "exported"),
        ),
        _Column("mean rank", "kept rank, mean over the modules; then the exported one, where it differs", _ranks),
        _Column(
            "s/step", "seconds of one training step, median", lambda row: f"{row.seconds_per_step:#.3g}".rstrip(".")
        ),
    ]
    if reference is not None:
        heading = "× LoRA" if reference in REFERENCES else f"× {reference}"
        columns.append(_Column(heading, f"seconds per step over those of {reference} in this comparison", _ratio))
    if any(row.forgetting is not None for row in rows):
        columns.append(_Column("forgetting", "loss per token on general text, after training less before", _forgetting))
    several_seeds = any(row.seeds > 1 for row in rows)
    return [column for column in columns if several_seeds or column.heading != "spread"]


def _name(row: Row) -> str:
    if row.is_floor:
        return f"{row.label} (floor)"
    if row.is_ceiling:
        return f"{row.label} (ceiling)"
    return row.label


def _count(row: Row, kind: str) -> str:
    """A number of adapter parameters; the head alone has no adapter."""
    return "–" if row.is_floor else f"{getattr(row, kind):,}"


def _ranks(row: Row) -> str:
    if row.mean_rank is None:
        return "–"
    kept = f"{row.mean_rank:.1f}"
    exported = kept if row.exported_mean_rank is None else f"{row.exported_mean_rank:.1f}"
    return kept if kept == exported else f"{kept} → {exported}"


def _ratio(row: Row) -> str:
    return "–" if row.ratio_to_reference is None else f"{row.ratio_to_reference:.2f}"


def _forgetting(row: Row) -> str:
    return "–" if row.forgetting is None else f"{row.forgetting:+z.3f}"


def table(rows: Sequence[Row], metric: str) -> Table:
    """The comparison as a table for the terminal; it fits 80 columns unless a label is long, which then wraps."""
    columns = _columns(rows, metric)
    shown = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    shown.add_column(Text(columns[0].heading), overflow="fold", min_width=9)
    may_wrap = {"mean rank", columns[-1].heading}
    for column in columns[1:]:
        shown.add_column(Text(column.heading), justify="right", no_wrap=column.heading not in may_wrap)
    for row in rows:
        # As Text: a label in square brackets is no markup.
        shown.add_row(*(Text(column.cell(row)) for column in columns))
    return shown


def markdown(rows: Sequence[Row], metric: str, more_notes: Sequence[str] = ()) -> str:
    """The comparison as a Markdown table, for README files, with its own notes and `more_notes` below."""
    columns = _columns(rows, metric)
    lines = [[column.heading for column in columns], [":---", *["---:"] * (len(columns) - 1)]]
    lines += [[_markdown_cell(column.cell(row)) for column in columns] for row in rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    told = "".join(f"- {_markdown_text(note)}\n" for note in [*notes(rows), *more_notes])
    return f"{table}\n{told}" if told else table


def _markdown_cell(text: str) -> str:
    return _markdown_text(text).replace("|", "\\|")


def _markdown_text(text: str) -> str:
    return html.escape(printable(text), quote=False)


def _html_table(rows: Sequence[Row], metric: str) -> str:
    columns = _columns(rows, metric)
    helps = "; ".join(f"<b>{escape(column.heading)}</b>: {escape(column.help)}" for column in columns)
    cells = [[column.cell(row) for column in columns] for row in rows]
    table = wide_table([column.heading for column in columns], cells, "Results")
    return f'{table}\n<p class="note">{helps}.</p>'


# --- the page --------------------------------------------------------------------------------------------------------


def write_page(
    results: Sequence[Result],
    path: str | Path,
    title: str,
    reference: str | None = None,
    rates: Mapping[str, Sequence[float]] | None = None,
    more_notes: Sequence[str] = (),
) -> Path:
    """Write the comparison as one self-contained HTML page, whole or not at all.

    Args:
        results: runs of one comparison, one per label, seed and rate.
        path: where to write.
        title: the page's.
        reference: the label that all others are compared with; None for plain LoRA, where it was run.
        rates: for each label, the learning rates that were to be tried; None for those that the results have.
        more_notes: told below the table, after what the results themselves have to say.

    Returns:
        Where the page is.

    Raises:
        DataError: the results are none, or not of one comparison.
        ArgumentError: no run has the label of the reference.
    """
    if not results:
        raise DataError("there are no finished runs to report on")
    rows = summarise(results, reference, rates)
    path, metric = Path(path), results[0].metric
    with matplotlib.rc_context(STYLE):
        figures = "\n".join(
            section(plot, place) for place, plot in enumerate(draw(results, metric, reference), start=1)
        )
    told = [*notes(rows), *more_notes]
    body = (
        f"{fact_list(_facts(results, rows))}\n<h2>Results</h2>\n{_html_table(rows, metric)}\n{_html_notes(told)}\n"
        f"{figures}"
    )
    write_whole(path, whole_page(title, body))
    return path


def _facts(results: Sequence[Result], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was run, as names and values."""
    packages = _distinct(f"{name} {version}" for result in results for name, version in result.versions.items())
    return [
        ("Model", results[0].model),
        ("Task", results[0].task),
        ("Steps", _joined(result.steps for result in results)),
        ("Batch size", _joined(result.batch_size for result in results)),
        ("Learning rate", _by_value([(f"{row.learning_rate:g}", row.label) for row in rows if not row.is_floor])),
        ("Learning rate of the task head", _joined(f"{result.head_learning_rate:g}" for result in results)),
        (
            "Starting scale",
            _by_value([(f"{row.starting_scale:g}", row.label) for row in rows if row.starting_scale is not None]),
        ),
        ("Seeds", ", ".join(map(str, sorted({result.seed for result in results})))),
        (
            "Task head",
            f"{_joined(f'{result.head_parameters:,}' for result in results)} parameters, counted in no column",
        ),
        ("Command", _joined(result.command for result in results)),
        ("Data", _joined(result.data_digest for result in results)),
        ("Git", _joined(result.git or "none" for result in results)),
        ("Versions", ", ".join(packages)),
        ("Machine", _joined(result.machine for result in results)),
    ]


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values))


def _joined(values: Iterable[object]) -> str:
    return "; ".join(_distinct(values))


def _by_value(values_and_labels: Sequence[tuple[str, str]]) -> str:
    """One value where all labels share it, else each value with its labels."""
    if not values_and_labels:
        return "–"
    values = _distinct(value for value, _ in values_and_labels)
    if len(values) == 1:
        return values[0]
    labels = {value: [label for other, label in values_and_labels if other == value] for value in values}
    return "; ".join(f"{value} ({', '.join(labels[value])})" for value in values)


def _html_notes(told: Sequence[str]) -> str:
    items = "\n".join(f"<li>{escape(note)}</li>" for note in told)
    return f'<ul class="note">\n{items}\n</ul>' if items else ""
