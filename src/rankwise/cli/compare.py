"""`rankwise compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rankwise.compare.engines import Engine
    from rankwise.compare.spec import Spec
    from rankwise.compare.summary import Row


def compare(
    spec: Path = typer.Argument(..., help="The SPEC, a TOML file."),
    out: Path | None = typer.Option(None, "--out", help="Write here instead of the SPEC's `output`."),
    workers: int | None = typer.Option(None, "--workers", help="Run so many at a time on this machine, by Ray."),
    on: str | None = typer.Option(
        None, "--on", help="`ray`: as many at a time as this machine has room for; `ray=HOST:PORT`: on that cluster."
    ),
    cpus_per_run: int | None = typer.Option(
        None, "--cpus-per-run", help="Cores (threads) of each run; left out, an equal share of them, or 1 on a cluster."
    ),
    gpus_per_run: float | None = typer.Option(
        None, "--gpus-per-run", help="Share of a GPU for each run; left out, a whole one where there are GPUs."
    ),
) -> None:
    """Train several methods and seeds under equal budgets; write a table and a page of plots.

    The head alone on the frozen model is trained too, for every seed: a method that is not above it has added nothing.
    Finished runs are kept, and one that fails does not stop the others: the same command goes on after a crash, and
    tries failed runs again.

    Example: `rankwise compare spec.toml --workers 2`
    """
    from rankwise.compare.engines import engine_for
    from rankwise.compare.spec import read_spec

    read = read_spec(spec)
    read = read if out is None else read.with_output(out)
    engine = engine_for(workers, on, cpus_per_run, gpus_per_run)
    options = {
        "--workers": workers,
        "--on": on,
        "--cpus-per-run": cpus_per_run,
        "--gpus-per-run": gpus_per_run,
    }
    given = [f" {name} {value}" for name, value in options.items() if value is not None]
    run_and_show(read.with_floor(), f"rankwise compare {spec}{''.join(given)}", engine)


def run_and_show(spec: Spec, command: str, engine: Engine | None = None) -> None:
    """Plan, run with progress, print the table and where everything is; exit code 1 where a run failed."""
    from rankwise.cli.progress import Watching
    from rankwise.compare.asked import Asked
    from rankwise.compare.failures import FailedRunsError
    from rankwise.compare.plan import make_plan
    from rankwise.compare.runner import run_plan
    from rankwise.compare.summary import summarise
    from rankwise.compare.together import is_first

    quiet_libraries()
    plan = make_plan(spec)
    if not is_first():
        run_plan(plan, command)
        return
    failed = None
    with Watching(plan) as watch:
        try:
            results = run_plan(plan, command, watch, engine)
        except FailedRunsError as error:
            failed = error
            results = error.results
    if results:
        more_notes = failed.notes if failed else ()
        print_table(summarise(results, spec.reference, Asked.of(plan).rates), results[0].metric, more_notes)
        typer.echo(f"page     {spec.output / 'report.html'}")
        kinds = {"exports": "to serve, a plain LoRA each", "adapters": "to train on"}
        made = {spec.output / folder: use for folder, use in kinds.items() if (spec.output / folder).exists()}
        if made:
            typer.echo("adapters " + ", ".join(f"{folder} ({use})" for folder, use in made.items()))
    if failed:
        typer.echo(f"rankwise: {failed}", err=True)
        raise typer.Exit(1)


def print_table(rows: Sequence[Row], metric: str, more_notes: Sequence[str] = ()) -> None:
    """The table, and what has to be said about it."""
    from rich.console import Console

    from rankwise.compare.notes import notes
    from rankwise.compare.report import table

    Console().print(table(rows, metric))
    for note in [*notes(rows), *more_notes]:
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
