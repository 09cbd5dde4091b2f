"""Dispatch. Nothing heavy is imported until a command runs, so that help answers at once."""

from __future__ import annotations

import logging
import sys

import typer
from typer.exceptions import TyperException

import rankwise
from rankwise.cli import (
    check_export,
    compare,
    complete,
    demo,
    evaluate,
    export,
    fix,
    inspect,
    merge,
    methods,
    report,
    shrink,
    spec,
    train,
)
from rankwise.cli.output import stop
from rankwise.errors import RankwiseError

INTERRUPTED = 130
TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Packages that warn on import of parts that a machine lacks, and that no command needs."""

app = typer.Typer(
    name="rankwise",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.command("evaluate")(evaluate.evaluate)
app.command("report")(report.report)
app.command("spec")(spec.spec)
app.command("inspect")(inspect.inspect)
app.command("export")(export.export)
app.command("check-export")(check_export.check_export)
app.command("fix")(fix.fix)
app.command("shrink")(shrink.shrink)
app.command("merge")(merge.merge)
app.command("complete")(complete.complete)
app.command("methods")(methods.methods)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rankwise {rankwise.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Low-rank fine-tuning that chooses its own ranks.

    Example: `rankwise compare spec.toml`
    """


def main() -> None:
    """Run the command line; a mistake of the user's is one sentence and exit code 2."""
    for package in TALKATIVE:
        logging.getLogger(package).setLevel(logging.ERROR)
    try:
        code = app(standalone_mode=False)
    except (RankwiseError, TyperException) as error:
        stop(error)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        stop(RankwiseError(f"{error.filename} cannot be written ({error.strerror})"))
    if code == INTERRUPTED:
        typer.echo("stopped; finished runs are kept, and the same command goes on", err=True)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
