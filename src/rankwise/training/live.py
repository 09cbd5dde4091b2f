"""Telling a tracker of an adapter's spectra while it trains: numbers for each module, and two images of all of them."""

from __future__ import annotations

import importlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rankwise.pages.draw import draw_spectra, heat_map, of_largest_rows, spectra_of
from rankwise.pages.places import grid_of
from rankwise.pages.style import PALETTE, STYLE, WIDTH
from rankwise.spectral import Record

IMAGE_DPI = 80
"""Of images for trackers: enough to read a heat map, and small."""


def scalars(record: Record) -> dict[str, float]:
    """A record as numbers: of each module its rank, effective rank, subspace use and norm; and the budget."""
    told: dict[str, float] = {}
    for name, layer in record.modules.items():
        told[f"rank/{name}"] = layer.kept
        told[f"effective_rank/{name}"] = layer.effective_rank
        told[f"subspace_use/{name}"] = layer.subspace_use
        told[f"update_norm/{name}"] = layer.norm
    if record.budget is not None:
        told["rank/budget"] = record.budget
    return told


def images(record: Record) -> dict[str, np.ndarray]:
    """A record as images, (height, width, 3) of bytes: kept ranks by layer and module, and all spectra."""
    with matplotlib.rc_context(STYLE):
        return {"ranks": _pixels(_rank_map(record)), "spectra": _pixels(_spectra(record))}


def tell(tracker: Any, record: Record) -> None:
    """Send a record to one of accelerate's trackers, under its step."""
    tracker.log(scalars(record), step=record.step)
    drawn = images(record)
    if tracker.name == "trackio":
        # accelerate's tracker of trackio has no images, and trackio's own need its class.
        picture = importlib.import_module("trackio").Image
        tracker.log({name: picture(pixels) for name, pixels in drawn.items()}, step=record.step)
    elif tracker.name == "tensorboard":
        stacks = {name: pixels[None] for name, pixels in drawn.items()}
        tracker.log_images(stacks, step=record.step, dataformats="NHWC")
    else:
        lists = {name: [pixels] for name, pixels in drawn.items()}
        tracker.log_images(lists, step=record.step)


def _rank_map(record: Record) -> Figure:
    ranks, _ = of_largest_rows({name: layer.kept for name, layer in record.modules.items()})
    grid = grid_of(ranks)
    figure = Figure(figsize=(WIDTH, 0.95 + 0.27 * len(grid.kinds)), layout="constrained")
    axes = figure.subplots()
    heat_map(axes, ranks, grid, top=max(layer.rank for layer in record.modules.values()))
    axes.set_title(f"Kept ranks at step {record.step}")
    return figure


def _spectra(record: Record) -> Figure:
    figure = Figure(figsize=(WIDTH / 2, 3.6), layout="constrained")
    axes = figure.subplots()
    values = {name: layer.singular_values for name, layer in record.modules.items()}
    draw_spectra(axes, spectra_of(values, relative=False), PALETTE[0])
    axes.set(title=f"Singular values at step {record.step}", xlabel="index i", ylabel="σᵢ (log scale)")
    return figure


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(IMAGE_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
