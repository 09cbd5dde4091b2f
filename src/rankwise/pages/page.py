"""A page of figures: one file that needs no network and no script, in light and dark, on a screen and on paper.

Figures are SVG drawn by matplotlib, which works without a display and keeps a page small; they are drawn through the
Figure class, never pyplot, which keeps global state. They stay dark on white on a dark page too, as a photograph does.
"""

from __future__ import annotations

import html
import io
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from matplotlib.figure import Figure

from rankwise.pages.places import printable
from rankwise.pages.style import Plot

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --faint: #555; --line: #ddd; --link: #1a4fa3; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e8e8e8; --faint: #b0b0b0; --line: #3a3d44; --link: #8ab4f8; }
}
body { max-width: 1056px; margin: 2rem auto; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: 1rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
h1, td, th, dd, li, figcaption { overflow-wrap: break-word; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -100vw; }
.skip:focus { position: static; }
nav ul { margin: 1rem 0 0; padding-left: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--faint); }
dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
th:first-child { text-align: left; }
.note, figcaption { color: var(--faint); font-size: .9rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media print {
  :root { --paper: #fff; --ink: #000; --faint: #444; --line: #bbb; --link: #000; }
  body { max-width: none; margin: 0; }
  nav, .skip { display: none; }
  section, figure { break-inside: avoid; }
}
"""


def escape(text: str) -> str:
    """A text as HTML shows it."""
    return html.escape(printable(text))


def whole_page(title: str, body: str, head: str = "") -> str:
    """A page with its style in it.

    Args:
        title: of the page and its first heading.
        body: what follows the heading, as HTML.
        head: more of the page's head, as HTML.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{head}<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#content">Skip to the content</a>\n<main id="content">\n'
        f"<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def fact_list(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values, as HTML."""
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts)
    return f"<dl>\n{items}\n</dl>"


def wide_table(headings: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table whose first column names the rows, as HTML; where it is too wide, the arrow keys scroll it.

    Args:
        headings: of the columns.
        rows: their cells.
        label: what a screen reader calls it.
    """
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        # A long name of a module breaks at its dots.
        name = escape(first).replace(".", ".<wbr>")
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide" role="region" aria-label="{escape(label)}" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def section(plot: Plot, place: int) -> str:
    """A figure under its heading and above its caption, as HTML; `place` keeps the ids of a page's figures apart."""
    heading, caption = escape(plot.heading), escape(plot.caption)
    if plot.figure is None:
        return f"<section>\n<h2>{heading}</h2>\n<p>{caption}</p>\n</section>"
    svg = inline_svg(svg_of(plot.figure), f"f{place}-", f"{plot.heading}. {plot.caption}")
    return f"<section>\n<h2>{heading}</h2>\n<figure>\n{svg}\n<figcaption>{caption}</figcaption>\n</figure>\n</section>"


def svg_of(figure: Figure) -> str:
    """The figure as an SVG file; the same figure gives the same file."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def inline_svg(svg: str, prefix: str, description: str) -> str:
    """A figure as an element of an HTML page.

    Args:
        svg: as `svg_of` gives it.
        prefix: of its ids, which makes them unique among the page's figures.
        description: what a screen reader says of it.
    """
    root = ET.fromstring(svg)
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
