"""`rankwise check-export`."""

from __future__ import annotations

from pathlib import Path

import typer

from rankwise.export.servers import SERVERS


def check_export(
    folder: Path = typer.Argument(..., help="A LoRA adapter, ours or not: a folder, or a pipeline's file."),
    servers: str | None = typer.Option(
        None,
        "--for",
        metavar="SERVERS",
        help=f"Some of {', '.join(SERVERS)}, between commas; by default those that load such files.",
    ),
    base: str | None = typer.Option(None, "--base", help="The base model, if not where the adapter says."),
) -> None:
    """Say what servers would refuse in an adapter, or accept and compute otherwise.

    Exit code 1 if there is anything. Example: `rankwise check-export runs/lora --for vllm,llama.cpp`
    """
    from rankwise.export.check import check_export as check
    from rankwise.export.pipeline_files import pipeline_file

    if servers is None:
        is_peft_folder = pipeline_file(folder) is None
        asked = [name for name, server in SERVERS.items() if server.loads_peft_folders == is_peft_folder]
    else:
        asked = [server.strip() for server in servers.split(",")]
    reports = [check(folder, server, base=base) for server in asked]
    for report in reports:
        limited = SERVERS[report.server].has_rank_limit
        takes_it = f"takes it, started with max_lora_rank {report.max_lora_rank}" if limited else "takes it"
        typer.echo(f"{report.server:10} {'does not take it' if report.problems else takes_it}")
        for problem in report.problems:
            typer.echo(f"           {problem.rule}: {problem.sentence}")
    if not reports[0].base_seen:
        typer.echo("not checked: module names and widths, since the base model does not open (--base)", err=True)
    if any(report.problems for report in reports):
        raise typer.Exit(1)
