"""`rankwise inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rankwise.cli.output import by_kind, print_modules, span

if TYPE_CHECKING:
    from rankwise.inspection.found import Found
    from rankwise.spectral import Measured


def inspect(
    adapters: list[Path] = typer.Argument(..., help="Saved adapters: of rankwise, or plain LoRAs of anybody's."),
    against: Path | None = typer.Option(None, "--against", help="Another adapter to compare the first one with."),
    checkpoints: Path | None = typer.Option(
        None, "--checkpoints", help="The first one's training: a trainer's output folder, or a recorder's records."
    ),
    base: str | None = typer.Option(
        None, "--base", help="The base model: the updates are then measured against its weights, too."
    ),
    energy: float = typer.Option(0.99, "--energy", help="Share of Σ σ² that the last column's rank keeps."),
    every: bool = typer.Option(False, "--all", help="A row for every module."),
    out: Path | None = typer.Option(
        None, "--out", help="Folder of the page; by default the first adapter's name with -inspected, beside it."
    ),
    force: bool = typer.Option(False, "--force", help="Replace a folder that holds something else."),
) -> None:
    """Say what saved adapters have learnt: a table here, and a page of figures with a sentence under each.

    rank: of the tensors; kept: not pruned; effective: exp of the entropy of the singular values. The page needs no
    network; PNG, SVG and CSV of every figure lie beside it.

    Example: `rankwise inspect runs/mine/adapters/adalora--0123456789ab--seed0`
    """
    from rankwise.errors import ArgumentError

    if not 0 < energy <= 1:
        raise ArgumentError("--energy", "be in (0, 1]", energy)
    first = adapters[0]
    page_folder = out or first.with_name(f"{first.name}-inspected")
    _quiet_libraries_if_needed([*adapters, *([against] if against else [])], base)

    from rankwise.inspection.found import read_adapter
    from rankwise.inspection.history import read_history
    from rankwise.inspection.page import require_free_page, write_inspection

    require_free_page(page_folder, overwrite=force)
    found = [read_adapter(folder, base) for folder in adapters]
    other = None if against is None else read_adapter(against, base)
    history: list[Measured] = [] if checkpoints is None else read_history(checkpoints, base)
    for each in found:
        _print(each, energy, every, named=len(found) > 1)
    page = write_inspection(found, page_folder, against=other, history=history)
    typer.echo(f"page     {page}")


def _quiet_libraries_if_needed(folders: list[Path], base: str | None) -> None:
    """Silence transformers where it will be imported: for an adapter of ours, or a base model."""
    from rankwise.inspection.found import is_ours

    if base is not None or any(is_ours(folder) for folder in folders):
        from rankwise.cli.compare import quiet_libraries

        quiet_libraries()


def _print(found: Found, energy: float, every: bool, *, named: bool) -> None:
    """One adapter's table and what is told below it."""
    from rich.console import Console

    modules = found.record.modules
    if named:
        typer.echo(f"folder   {found.folder}")
    columns = ("module", "modules", "rank", "kept", "‖ΔW‖_F", "effective", f"{100 * energy:g} %")
    print_modules(Console(), columns, _rows(found, energy, every))
    kept, held = sum(layer.kept for layer in modules.values()), sum(layer.rank for layer in modules.values())
    norm = sum(layer.norm**2 for layer in modules.values()) ** 0.5
    typer.echo(f"adapter  {found.what}")
    typer.echo(f"trained  {found.trained}")
    typer.echo(f"ranks    {kept} kept; tensors hold {held}, an export {sum(f.r for f in found.exported.values())}")
    typer.echo(f"update   ‖ΔW‖_F {norm:.4g} over all modules")
    if found.unfinished:
        typer.echo(f"rankwise: {found.unfinished}", err=True)


def _rows(found: Found, energy: float, every: bool) -> list[list[str]]:
    """A row for each name that differs only in layer numbers, or for every module."""
    import torch

    from rankwise.spectral import energy_rank

    rows: list[list[str]] = []
    for kind, names in by_kind(found.record.modules, every).items():
        layers = [found.record.modules[name] for name in names]
        spectra = [torch.tensor(layer.singular_values, dtype=torch.float64) for layer in layers]
        rows.append(
            [
                kind,
                str(len(names)),
                span([layer.rank for layer in layers]),
                span([layer.kept for layer in layers]),
                span([layer.norm for layer in layers], ".3g"),
                span([layer.effective_rank for layer in layers], ".1f"),
                span([int(energy_rank(spectrum, energy)) for spectrum in spectra]),
            ]
        )
    return rows
