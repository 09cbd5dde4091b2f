"""`rankwise inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from rankwise.cli.output import by_kind, span

if TYPE_CHECKING:
    from rich.table import Table

    from rankwise.adapters.progress import Progress
    from rankwise.spectral import Spectrum
    from rankwise.update import Factors


def inspect(
    adapter: Path = typer.Argument(..., help="A saved adapter: of rankwise, or a plain LoRA of anybody's."),
    energy: float = typer.Option(0.99, "--energy", help="Share of Σ σ² that the last column's rank keeps."),
    base: str | None = typer.Option(
        None, "--base", help="The base model, if not where the adapter says; a plain LoRA needs none."
    ),
    every: bool = typer.Option(False, "--all", help="A row for every module."),
) -> None:
    """Say what ranks a saved adapter has, and what the updates that an export would hold use of them.

    rank: of the tensors; kept: not pruned; effective: exp of the entropy of the singular values.

    Example: `rankwise inspect runs/mine/adapters/adalora--0123456789ab--seed0`
    """
    from rich.console import Console

    from rankwise.errors import ArgumentError
    from rankwise.spectral import spectra

    if not 0 < energy <= 1:
        raise ArgumentError("--energy", "be in (0, 1]", energy)
    found = _read(adapter, base)
    spectrum = spectra(found.exported)
    Console().print(_table(found, spectrum, energy, every))
    norm = sum(float(s.singular_values.square().sum()) for s in spectrum.values()) ** 0.5
    kept, held = sum(found.kept.values()), sum(found.ranks.values())
    typer.echo(f"adapter  {found.what}")
    typer.echo(f"trained  {found.trained}")
    typer.echo(f"ranks    {kept} kept; tensors hold {held}, an export {sum(f.r for f in found.exported.values())}")
    typer.echo(f"update   ‖ΔW‖_F {norm:.4g} over all modules")
    if found.unfinished:
        typer.echo(f"rankwise: {found.unfinished}", err=True)


class _Found(NamedTuple):
    """What a folder holds."""

    what: str
    trained: str
    ranks: dict[str, int]
    """Of the tensors."""
    kept: dict[str, int]
    """What the method has not pruned; of a plain LoRA, ranks that are not 0."""
    exported: dict[str, Factors]
    """The updates without ranks that hold nothing."""
    unfinished: str | None = None


def _read(folder: Path, base: str | None) -> _Found:
    """An adapter of rankwise's, which needs its base model's shapes, or else a plain LoRA."""
    from rankwise.export.lora_config import OURS, saved_config
    from rankwise.export.pipeline_lora import read_any_lora
    from rankwise.export.reader import recorded_command

    command = recorded_command(folder)
    told = f", by `{command}`" if command else ""
    if str(saved_config(folder).get("peft_type")).startswith(OURS):
        return _read_trained(folder, base, told)
    updates = read_any_lora(folder).updates
    ranks, exported = {name: f.r for name, f in updates.items()}, {name: f.kept() for name, f in updates.items()}
    kept = {name: f.r for name, f in exported.items()}
    return _Found("a plain LoRA", f"a plain LoRA does not say how far{told}", ranks, kept, exported)


def _read_trained(folder: Path, base: str | None, told: str) -> _Found:
    """An adapter of rankwise's."""
    from rankwise.adapters.lookup import reduced
    from rankwise.adapters.progress import unfinished
    from rankwise.cli.compare import quiet_libraries
    from rankwise.errors import AdapterFileError
    from rankwise.export.adapter import first_not_finite
    from rankwise.export.reader import TENSORS
    from rankwise.export.trained import from_folder

    quiet_libraries()
    adapter = from_folder(folder, base)
    broken = first_not_finite(adapter.updates)
    if broken:
        raise AdapterFileError(f"{folder / TENSORS} holds NaN or infinity in the update of {broken!r}")
    return _Found(
        f"{adapter.method.method} on {adapter.base_class}",
        _steps(adapter.progress) + told,
        {name: f.r for name, f in adapter.updates.items()},
        dict(zip(adapter.updates, adapter.ranks, strict=True)),
        reduced(adapter.updates, adapter.method),
        unfinished(adapter.method, adapter.progress, adapter.ranks) if adapter.progress.step else None,
    )


def _steps(progress: Progress) -> str:
    if not progress.step:
        return "no step yet"
    total = f" of {progress.total}" if progress.total else ""
    return f"to step {progress.step}{total}" + (f", {progress.skipped} skipped" if progress.skipped else "")


def _table(found: _Found, spectrum: dict[str, Spectrum], energy: float, every: bool) -> Table:
    """A row for each name that differs only in layer numbers, or for every module."""
    from rich.table import Column, Table

    measures = ("‖ΔW‖_F", "effective", f"{100 * energy:g} %")
    table = Table(Column("module", overflow="fold"), "modules", "rank", "kept", *measures)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for kind, names in by_kind(found.ranks, every).items():
        spectra = [spectrum[name] for name in names]
        table.add_row(
            kind,
            str(len(names)),
            span([found.ranks[name] for name in names]),
            span([found.kept[name] for name in names]),
            span([float(s.singular_values.norm()) for s in spectra], ".3g"),
            span([s.effective_rank for s in spectra], ".1f"),
            span([s.energy_rank(energy) for s in spectra]),
        )
    return table
