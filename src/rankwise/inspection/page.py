"""The page of an inspection, with PNG, SVG and CSV of every figure beside it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

from rankwise.errors import ArgumentError
from rankwise.files import whole_folder
from rankwise.inspection.against import answers_against
from rankwise.inspection.answer import QUESTIONS, Answer
from rankwise.inspection.figures import answers_of
from rankwise.inspection.found import Found
from rankwise.inspection.over_time import answers_over_time
from rankwise.pages.page import escape, fact_list, inline_svg, svg_of, whole_page, wide_table
from rankwise.pages.style import STYLE
from rankwise.spectral import Measured

PAGE = "index.html"
GENERATOR = '<meta name="generator" content="rankwise inspect">\n'
"""In the head of a page: a folder that has such a page may be replaced by a newer one."""
PNG_DPI = 120


def write_inspection(
    adapters: Sequence[Found], out: Path, *, against: Found | None = None, history: Sequence[Measured] = ()
) -> Path:
    """Write what adapters have learnt as one self-contained page in a folder, whole or not at all.

    Args:
        adapters: one or several.
        out: the folder. An earlier inspection in it is replaced.
        against: another adapter that the first one is compared with.
        history: looks at the first adapter over its training, in the order of steps.

    Returns:
        Where the page is.

    Raises:
        DataError: the two adapters have no module in common.
    """
    with matplotlib.rc_context(STYLE):
        answers = [answer for found in adapters for answer in _answers(found, of_several=len(adapters) > 1)]
        if against is not None:
            answers += answers_against(adapters[0], against)
        if history:
            answers += answers_over_time(history)
        with whole_folder(out) as folder:
            sections = [_section(answers, question, folder) for question in QUESTIONS]
            title = "What was learnt: " + ", ".join(found.folder.name for found in adapters)
            body = "\n".join([_facts(adapters, against), _contents(answers), *sections, _modules(adapters)])
            (folder / PAGE).write_text(whole_page(title, body, GENERATOR), encoding="utf-8")
    return out / PAGE


def require_free_page(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else than an earlier inspection.

    Raises:
        ArgumentError: there is such a folder, and `overwrite` is not set.
    """
    page = out / PAGE
    is_inspection = page.is_file() and GENERATOR in page.read_text(encoding="utf-8", errors="replace")
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not (is_inspection or is_empty or overwrite):
        raise ArgumentError("--out", "be new or hold an earlier inspection (--force replaces anything)", str(out))


def _answers(found: Found, *, of_several: bool) -> list[Answer]:
    """The figures of one adapter; of several, each with the adapter's name, which must part their files, too."""
    answers = answers_of(found)
    if not of_several:
        return answers
    name = found.folder.name
    return [
        replace(
            answer,
            name=f"{_file_name(name)}-{answer.name}",
            plot=replace(answer.plot, heading=f"{name}: {answer.plot.heading}"),
        )
        for answer in answers
    ]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.\-]+", "-", text)


def _contents(answers: Sequence[Answer]) -> str:
    asked = [question for question in QUESTIONS if any(answer.question == question for answer in answers)]
    links = [f'<li><a href="#{_anchor(question)}">{escape(question)}</a></li>' for question in asked]
    links.append('<li><a href="#modules">Every module in numbers</a></li>')
    return f'<nav aria-label="Questions"><ul>\n{"".join(links)}\n</ul></nav>'


def _anchor(question: str) -> str:
    return re.sub(r"\W+", "-", question.lower()).strip("-")


def _section(answers: Sequence[Answer], question: str, folder: Path) -> str:
    """The figures that answer a question, and their files; nothing where there is none."""
    own = [answer for answer in answers if answer.question == question]
    if not own:
        return ""
    anchor = _anchor(question)
    figures = "\n".join(_figure(answer, folder) for answer in own)
    heading = f'<h2 id="{anchor}-h">{escape(question)}</h2>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-h">\n{heading}\n{figures}\n</section>'


def _figure(answer: Answer, folder: Path) -> str:
    heading, caption = escape(answer.plot.heading), escape(answer.plot.caption)
    links = []
    drawing = ""
    if answer.plot.figure is not None:
        svg = svg_of(answer.plot.figure)
        (folder / f"{answer.name}.svg").write_text(svg, encoding="utf-8")
        answer.plot.figure.savefig(folder / f"{answer.name}.png", dpi=PNG_DPI)
        drawing = inline_svg(svg, f"{answer.name}-", f"{answer.plot.heading}. {answer.plot.caption}")
        links = ["png", "svg"]
    if answer.columns:
        (folder / f"{answer.name}.csv").write_text(_csv(answer), encoding="utf-8")
        links.append("csv")
    told = " ".join(
        f'<a href="{answer.name}.{kind}" aria-label="{heading} as {kind.upper()}">{kind.upper()}</a>' for kind in links
    )
    files = f' <span class="files">{told}</span>' if told else ""
    if not drawing:
        return f"<h3>{heading}</h3>\n<p>{caption}{files}</p>"
    return f"<h3>{heading}</h3>\n<figure>\n{drawing}\n<figcaption>{caption}{files}</figcaption>\n</figure>"


def _csv(answer: Answer) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(answer.columns)
    writer.writerows(answer.rows)
    return text.getvalue()


def _facts(adapters: Sequence[Found], against: Found | None) -> str:
    facts: list[tuple[str, str]] = []
    for found in adapters:
        modules = found.record.modules.values()
        kept, held = sum(layer.kept for layer in modules), sum(layer.rank for layer in modules)
        norm = sum(layer.norm**2 for layer in modules) ** 0.5
        facts += [
            ("Adapter", str(found.folder)),
            ("Method", found.what),
            ("Trained", found.trained),
            ("Ranks", f"{kept} kept over {len(modules)} modules; tensors hold {held}"),
            ("Update", f"‖ΔW‖_F {norm:.4g} over all modules"),
        ]
        if found.unfinished:
            facts.append(("Unfinished", found.unfinished))
    if against is not None:
        facts.append(("Against", f"{against.folder} ({against.what})"))
    return fact_list(facts)


def _modules(adapters: Sequence[Found]) -> str:
    """A table of all modules for each adapter: what the figures show, for those who cannot see them."""
    headings = ("module", "rank", "kept", "‖ΔW‖_F", "effective", "stable", "numerical", "use", "κ(U)", "κ(V)")
    tables = []
    for found in adapters:
        rows = [
            [
                name,
                str(layer.rank),
                str(layer.kept),
                f"{layer.norm:.3g}",
                f"{layer.effective_rank:.1f}",
                f"{layer.stable_rank:.1f}",
                str(layer.numerical_rank),
                f"{layer.subspace_use:.2f}",
                "–" if layer.condition_of_left is None else f"{layer.condition_of_left:.3g}",
                "–" if layer.condition_of_right is None else f"{layer.condition_of_right:.3g}",
            ]
            for name, layer in found.record.modules.items()
        ]
        heading = f"<h3>{escape(found.folder.name)}</h3>\n" if len(adapters) > 1 else ""
        tables.append(heading + wide_table(headings, rows, f"Modules of {found.folder.name}"))
    return '<section id="modules">\n<h2>Every module in numbers</h2>\n' + "\n".join(tables) + "\n</section>"
