"""What figures of several pages have in common: heat maps by layer and module, and spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from rankwise.pages.places import Grid, grid_of

MOST_LINES = 36
"""Lines of one panel, beyond which they hide each other."""
MOST_ROWS = 48
"""Rows of a heat map: more would fill several screens and take minutes to draw."""
NEGLIGIBLE = 1e-8
"""Singular values up to this share of the largest are not drawn."""


def of_largest_rows(numbers: Mapping[str, float]) -> tuple[dict[str, float], int]:
    """The modules of the rows that a heat map has room for, those with the largest numbers, in their order.

    Args:
        numbers: by module name. Names without layer numbers make a row each, and there may be hundreds.

    Returns:
        Numbers by module name, and how many rows there are in all.
    """
    grid = grid_of(numbers)
    largest: dict[str, float] = {}
    for name, number in numbers.items():
        kind, _ = grid.places[name]
        largest[kind] = max(number, largest.get(kind, number))
    shown = set(sorted(largest, key=lambda kind: -largest[kind])[:MOST_ROWS])
    return {name: number for name, number in numbers.items() if grid.places[name][0] in shown}, len(largest)


def heat_map(axes: Axes, numbers: Mapping[str, float], grid: Grid, top: float, form: str = ".0f") -> None:
    """A number for each module as a colour from 0 to `top`, with the number written in it.

    Args:
        axes: where to draw.
        numbers: by module name.
        grid: the place of each module.
        top: what the darkest colour stands for.
        form: how numbers are written.
    """
    kinds, layers = grid.kinds, grid.layers
    values = np.full((len(kinds), len(layers)), np.nan)
    for name, number in numbers.items():
        kind, layer = grid.places[name]
        values[kinds.index(kind), layers.index(layer)] = number
    axes.pcolormesh(values, cmap="Blues", vmin=0, vmax=top, edgecolors="white", linewidth=0.5)
    longest = max((len(format(number, form)) for number in numbers.values()), default=1)
    size = min(9.0, 330 / len(layers), 960 / (len(layers) * longest))
    for (row, column), number in np.ndenumerate(values):
        if not math.isnan(number):
            colour = "white" if number > 0.6 * top else "#1a1a1a"
            axes.text(
                column + 0.5, row + 0.5, format(number, form), ha="center", va="center", fontsize=size, color=colour
            )
    axes.set_yticks([row + 0.5 for row in range(len(kinds))], kinds)
    stride = 1 + len(layers) // 40
    axes.set_xticks([column + 0.5 for column in range(len(layers))][::stride], layers[::stride])
    axes.set(xlabel="layer", ylabel="module", ylim=(len(kinds), 0))
    axes.grid(visible=False)
    axes.tick_params(length=0)


def spectra_of(singular_values: Mapping[str, Sequence[float]], *, relative: bool) -> np.ndarray:
    """Singular values, one row per module that has an update, largest first and 0 where there is none.

    Args:
        singular_values: by module name.
        relative: divide each module's by its largest.
    """
    longest = max(map(len, singular_values.values()), default=0)
    rows = [sorted(values, reverse=True) + [0.0] * (longest - len(values)) for values in singular_values.values()]
    changed = [row for row in rows if row and row[0] > 0]
    spectra = np.array(changed, dtype=float).reshape(len(changed), longest)
    shares = spectra / spectra[:, :1]
    return np.where(shares > NEGLIGIBLE, shares if relative else spectra, 0.0)


def plain_log_axis(axes: Axes) -> None:
    """A logarithmic vertical axis whose labels are plain numbers: formulas are off in the figures' style."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def draw_spectra(axes: Axes, spectra: np.ndarray, colour: str) -> None:
    """A line for each module on a logarithmic axis, and a black one for their median."""
    plain_log_axis(axes)
    if not len(spectra):
        axes.text(0.5, 0.5, "no update", transform=axes.transAxes, ha="center", va="center")
        return
    # An invisible line a power of ten below the top: flat spectra then still have two labelled powers in view.
    axes.axhline(spectra.max() / 10, alpha=0)
    shown = np.unique(np.linspace(0, len(spectra) - 1, MOST_LINES).round().astype(int))
    for values in spectra[shown]:
        _draw_values(axes, values, color=colour, linewidth=0.8, alpha=0.55)
    _draw_values(axes, np.median(spectra, axis=0), color="#1a1a1a", linewidth=2.2)


def _draw_values(axes: Axes, values: np.ndarray, **style: Any) -> None:
    kept = values[values > 0]
    axes.plot(np.arange(1, len(kept) + 1), kept, marker="." if len(kept) == 1 else None, **style)


def blank_rest(panels: np.ndarray, used: int) -> None:
    """Hides the panels of a grid that are left over; the panel above each one then has to show its own tick labels."""
    across, grid = panels.shape[1], list(panels.flat)
    for place in range(used, len(grid)):
        grid[place].set_axis_off()
        grid[place - across].tick_params(labelbottom=True)
