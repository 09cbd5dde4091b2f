"""`rankwise evaluate`."""

from __future__ import annotations

from pathlib import Path

import typer


def evaluate(
    adapter: Path = typer.Argument(..., help="The adapter's folder: of rankwise, of PEFT, or an export."),
    spec: Path = typer.Argument(..., help="A SPEC whose model, data and task say what is scored."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Score an adapter that exists already on a SPEC's validation and test splits.

    Nothing is trained and nothing is written. The scores are those that `rankwise compare` gives.

    Example: `rankwise evaluate runs/lora spec.toml`
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from rankwise.cli.compare import quiet_libraries
    from rankwise.compare.evaluate import evaluate_adapter
    from rankwise.compare.spec import read_spec

    read = read_spec(spec)
    quiet_libraries()
    scores = evaluate_adapter(adapter, read)
    if as_json:
        typer.echo(json.dumps(scores, indent=1))
        return
    table = Table("metric", *scores, box=None, pad_edge=False)
    for metric in read.task.metrics:
        table.add_row(metric, *(f"{values[metric]:.4f}" for values in scores.values()))
    Console().print(table)
