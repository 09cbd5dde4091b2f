"""What a comparison found: a table for the terminal, one for README files, and a page of plots.

The page is one file that needs no network and no script. Its figures are SVG drawn by matplotlib, which works without a
display and keeps a page small; they are drawn through the Figure class, never pyplot, which keeps global state.
"""

from __future__ import annotations

import html
import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from rankwise.compare.figures import STYLE, Plot, draw
from rankwise.compare.notes import notes
from rankwise.compare.places import printable
from rankwise.compare.results import Result
from rankwise.compare.summary import REFERENCES, Row, summarise
from rankwise.errors import DataError
from rankwise.files import write_whole

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
    return html.escape(printable(text))


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
            _section(plot, place) for place, plot in enumerate(draw(results, metric, reference), start=1)
        )
    told = [*notes(rows), *more_notes]
    facts = "\n".join(f"<dt>{_escape(name)}</dt><dd>{_escape(fact)}</dd>" for name, fact in _facts(results, rows))
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{_escape(title)}</h1>\n"
        f"<dl>\n{facts}\n</dl>\n<h2>Results</h2>\n{_html_table(rows, metric)}\n{_html_notes(told)}\n{figures}\n"
        f"</body>\n</html>\n"
    )
    write_whole(path, page)
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
    items = "\n".join(f"<li>{_escape(note)}</li>" for note in told)
    return f'<ul class="note">\n{items}\n</ul>' if items else ""


def _section(plot: Plot, place: int) -> str:
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
    root.set("aria-label", printable(description))
    return ET.tostring(root, encoding="unicode")


def _renamed(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == _XLINK:
        return value.replace("#", f"#{prefix}", 1)
    return value.replace("url(#", f"url(#{prefix}")
