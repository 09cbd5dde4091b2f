"""`rankwise check-export`."""

from __future__ import annotations

from pathlib import Path

import typer


def check_export(
    folder: Path = typer.Argument(..., help="A LoRA adapter, ours or not."),
    servers: str = typer.Option(
        "vllm,sglang,llama.cpp,peft", "--for", metavar="SERVERS", help="Also diffusers; several between commas."
    ),
    base: str | None = typer.Option(None, "--base", help="The base model, if not where the adapter says."),
) -> None:
    """Say what servers would refuse in an adapter, or accept and compute otherwise.

    Exit code 1 if there is anything. Example: `rankwise check-export runs/lora --for vllm,llama.cpp`
    """
    from rankwise.export.servers import check_export as check

    reports = [check(folder, server.strip(), base=base) for server in servers.split(",")]
    for report in reports:
        limit = f", started with max_lora_rank {report.max_lora_rank}" if report.server in ("vllm", "sglang") else ""
        typer.echo(f"{report.server:10} {'does not take it' if report.problems else 'takes it' + limit}")
        for problem in report.problems:
            typer.echo(f"           {problem.rule}: {problem.sentence}")
    if not reports[0].base_seen:
        typer.echo("not checked: module names and widths, since the base model does not open (--base)", err=True)
    if any(report.problems for report in reports):
        raise typer.Exit(1)
