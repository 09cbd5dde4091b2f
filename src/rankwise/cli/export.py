"""`rankwise export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rankwise.export.servers import SERVERS

if TYPE_CHECKING:
    from rankwise.export.lora import ExportReport


def export(
    adapter: Path = typer.Argument(..., help="A folder written by a rankwise adapter's `save_pretrained`."),
    out: Path = typer.Option(..., "--out", help="Folder to write."),
    server: str | None = typer.Option(
        None, "--for", metavar="SERVER", help=f"Write what it takes, checked: one of {', '.join(SERVERS)}."
    ),
    layout: str = typer.Option("uniform", "--layout", help="uniform: one rank, padded; compact: each module its own."),
    rank: int | None = typer.Option(None, "--rank", help="The most ranks of a module; above them, truncated."),
    base: str | None = typer.Option(None, "--base", help="The base model, if not where the adapter says."),
    check: str | None = typer.Option(
        None, "--check", metavar="MODEL", help="Compare logits too, of this base model with either adapter."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing folder."),
) -> None:
    """Write a trained adapter as a plain LoRA, verified before success is reported.

    Example: `rankwise export runs/mine/adapters/sora--*--seed0 --for vllm --out runs/lora`
    """
    from rankwise.cli.compare import quiet_libraries
    from rankwise.export.lora import export_lora

    quiet_libraries()
    report = export_lora(
        adapter, out, layout=layout, rank=rank, base=base, server=server, logits_of=check, overwrite=force
    )
    _show(report, server)


def _show(report: ExportReport, server: str | None) -> None:
    ranks = sorted(report.ranks.values())
    typer.echo(f"adapter  {report.folder} ({report.layout}, r = {report.rank}, {report.parameters:,} numbers)")
    typer.echo(
        f"ranks    {ranks[0]} to {ranks[-1]}, {sum(ranks) / len(ranks):.1f} on average over {len(ranks)} modules"
    )
    typer.echo(f"error    {report.relative_error:.1e} of ‖ΔW‖_F, read back from the file")
    if report.logits_error is not None:
        typer.echo(f"logits   {report.logits_error:.1e} of their largest, against the adapter")
    if server is not None:
        command = SERVERS[server].start_command.format(rank=report.max_lora_rank, folder=report.folder)
        typer.echo(f"load     {command}")
