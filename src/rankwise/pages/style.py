"""How the figures of all pages look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

# Paul Tol's "muted" scheme: nine colours that stay apart under the common forms of colour blindness. Markers and
# dashes repeat what the colour says.
PALETTE = ("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933")
MARKERS = "oDs^vPX<>"
DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1)))

WIDTH = 11.0  # inches; 1056 CSS pixels
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
