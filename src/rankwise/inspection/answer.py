"""One figure of a page: what it shows, the plain sentence under it, and the numbers it was drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rankwise.pages.draw import MOST_ROWS, heat_map, of_largest_rows
from rankwise.pages.places import grid_of
from rankwise.pages.style import WIDTH, Plot

QUESTIONS = (
    "What changed?",
    "Where did it change?",
    "How much of the budget was used?",
    "What could be dropped?",
    "How far is it from the pretrained weights?",
    "How does it differ from the other adapter?",
    "How did it come about?",
)
"""The sections of a page, in the order in which a reader asks."""


@dataclass(frozen=True)
class Answer:
    """One figure, or a sentence alone where there is nothing to draw."""

    question: str
    """One of `QUESTIONS`."""
    name: str
    """Of its files: name.svg, name.png and name.csv."""
    plot: Plot
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    """The numbers in the figure, for the CSV file."""


def map_of_modules(numbers: Mapping[str, float], title: str, *, form: str, top: float | None = None) -> Figure:
    """A heat map by layer and module.

    Args:
        numbers: by module name.
        title: of the figure.
        form: how numbers are written.
        top: what the darkest colour stands for; by default the largest number.
    """
    shown, rows = of_largest_rows(numbers)
    grid = grid_of(shown)
    if rows > MOST_ROWS:
        title = f"{title} ({MOST_ROWS} of {rows} rows, those with the largest numbers)"
    figure = Figure(figsize=(WIDTH, 1.0 + 0.27 * len(grid.kinds)), layout="constrained")
    axes = figure.subplots()
    largest = max(numbers.values(), default=0.0) if top is None else top
    heat_map(axes, shown, grid, largest or 1.0, form)
    axes.set_title(title)
    return figure


def rows_of(*columns: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each module, with its number in each of the columns."""
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def median(values: Sequence[float]) -> float:
    """The median as a number of Python's; 0 of nothing."""
    return float(np.median(values)) if len(values) else 0.0


def share(part: float, whole: float) -> str:
    """A part of a whole in per cent, in words that survive a whole of 0."""
    return f"{100 * part / whole:.0f} %" if whole else "none"


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 module", "3 modules"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
