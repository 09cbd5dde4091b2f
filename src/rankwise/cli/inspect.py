"""`rankwise inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from rankwise.cli.output import by_kind, span

if TYPE_CHECKING:
    from rich.table import Table

    from rankwise.spectral import Spectrum
    from rankwise.update import Factors


def inspect(
    adapter: Path = typer.Argument(..., help="A saved adapter: of rankwise, or a plain LoRA of anybody's."),
    energy: float = typer.Option(0.99, "--energy", help="Share of Σ σ² that the last column's rank keeps."),
    base: str | None = typer.Option(None, "--base", help="The base model, if not where the adapter says."),
    every: bool = typer.Option(False, "--all", help="A row for every module."),
) -> None:
    """Say what ranks a saved adapter has and what its updates use of them: norms and ranks of their spectra.

    Example: `rankwise inspect runs/mine/adapters/adalora--0123456789ab--seed0`
    """
    from rich.console import Console

    from rankwise.errors import ArgumentError
    from rankwise.spectral import spectra

    if not 0 < energy <= 1:
        raise ArgumentError("--energy", "be in (0, 1]", energy)
    found = _read(adapter, base)
    spectrum = spectra(found.updates)
    Console().print(_table(found, spectrum, energy, every))
    norm = sum(float(s.singular_values.square().sum()) for s in spectrum.values()) ** 0.5
    typer.echo(f"adapter  {found.what}")
    typer.echo(f"trained  {found.trained}")
    typer.echo(f"ranks    {sum(found.kept.values())} kept of {sum(f.r for f in found.updates.values())}")
    typer.echo(f"update   ‖ΔW‖_F {norm:.4g} over all modules")
    if found.unfinished:
        typer.echo(f"rankwise: {found.unfinished}", err=True)


class _Found(NamedTuple):
    """What a folder holds."""

    what: str
    trained: str
    updates: dict[str, Factors]
    kept: dict[str, int]
    """What the method has not pruned; of a plain LoRA, ranks that are not 0."""
    unfinished: str | None = None


def _read(folder: Path, base: str | None) -> _Found:
    """An adapter of rankwise's, which needs its base model's shapes, or else a plain LoRA."""
    from rankwise.adapters.configs import AdapterConfig
    from rankwise.adapters.progress import unfinished
    from rankwise.errors import AdapterFileError
    from rankwise.export.plain import read_plain
    from rankwise.export.source import TENSORS, finite, from_folder, opened_config, recorded

    config, command = opened_config(folder), recorded(folder)
    told = f", by `{command}`" if command else ""
    if not isinstance(config, AdapterConfig):
        plain = read_plain(folder)
        kept = {name: f.kept().r for name, f in plain.updates.items()}
        return _Found("a plain LoRA", f"a plain LoRA does not say how far{told}", plain.updates, kept)
    source = from_folder(folder, base)
    broken = finite(source.updates)
    if broken:
        raise AdapterFileError(f"{folder / TENSORS} holds NaN or infinity in the update of {broken!r}")
    progress, kept = source.progress, dict(zip(source.updates, source.ranks, strict=True))
    total = f" of {progress.total}" if progress.total else ""
    skipped = f", {progress.skipped} skipped" if progress.skipped else ""
    trained = f"{progress.step}{total} steps{skipped}{told}" if progress.step else "not yet"
    late = unfinished(source.config, progress, source.ranks) if progress.step else None
    return _Found(f"{source.config.method} on {source.base_class}", trained, source.updates, kept, late)


def _table(found: _Found, spectrum: dict[str, Spectrum], energy: float, every: bool) -> Table:
    """A row for each name that differs only in layer numbers, or for every module."""
    from rich.table import Column, Table

    table = Table(
        Column("module", overflow="fold"),
        "modules",
        "rank",
        "kept",
        "‖ΔW‖_F",
        "effective",
        "stable",
        f"{energy:.4g} energy",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, names in by_kind(found.updates, every).items():
        spectra = [spectrum[name] for name in names]
        norms = [float(s.singular_values.norm()) for s in spectra]
        table.add_row(
            kind,
            str(len(names)),
            span([found.updates[name].r for name in names]),
            span([found.kept[name] for name in names]),
            span(norms, ".3g"),
            span([s.effective_rank for s in spectra], ".1f"),
            span([s.stable_rank for s in spectra], ".1f"),
            span([s.energy_rank(energy) for s in spectra]),
        )
    return table
