"""`rankwise compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rankwise.cli.output import Watching

if TYPE_CHECKING:
    from rankwise.compare.spec import Spec
    from rankwise.compare.summary import Row


def compare(
    spec: Path = typer.Argument(..., help="The SPEC, a TOML file."),
    out: Path | None = typer.Option(None, "--out", help="Write here instead of the SPEC's `output`."),
) -> None:
    """Train several methods and seeds under equal budgets; write a table and a page of plots.

    The head alone on the frozen model is trained too, for every seed: a method that is not above it has added nothing.
    Finished runs are kept: the same command goes on after a crash, and may run on several machines over one folder.

    Example: `rankwise compare spec.toml`
    """
    from rankwise.compare.spec import read_spec

    read = read_spec(spec)
    read = read if out is None else read.with_output(out)
    run_and_show(read.with_floor(), f"rankwise compare {spec}", Watching)


def run_and_show(spec: Spec, command: str, watching: type[Watching]) -> None:
    """Plan, run with progress, print the table and where everything is."""
    from rankwise.compare.plan import make_plan
    from rankwise.compare.runner import run_plan
    from rankwise.compare.summary import summarise
    from rankwise.compare.together import is_first

    quiet_libraries()
    plan = make_plan(spec)
    if not is_first():
        run_plan(plan, command)
        return
    with watching(plan.count, plan.steps) as watch:
        results = run_plan(plan, command, watch)
    if results:
        print_table(summarise(results, spec.reference), results[0].metric)
    if len(results) < plan.count:
        typer.echo(f"under way elsewhere: {plan.count - len(results)}; the same command shows them once finished")
    if results:
        typer.echo(f"page     {spec.output / 'report.html'}")
        typer.echo(f"adapters {spec.output / 'exports'} (plain LoRA), {spec.output / 'adapters'} (to train on)")


def print_table(rows: Sequence[Row], metric: str) -> None:
    """The table, and what has to be said about it."""
    from rich.console import Console

    from rankwise.compare.notes import notes
    from rankwise.compare.report import table

    Console().print(table(rows, metric))
    for note in notes(rows):
        typer.echo(f"- {note}")


def quiet_libraries() -> None:
    """Only warnings that matter to a run: no bars inside ours, no advice about a head that is fresh on purpose."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
