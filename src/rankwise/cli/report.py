"""`rankwise report`."""

from __future__ import annotations

from pathlib import Path

import typer


def report(
    runs: Path | None = typer.Argument(None, help="The output folder of a comparison."),
    out: Path | None = typer.Option(None, "--out", help="Write the page here instead of RUNS/report.html."),
    reference: str | None = typer.Option(
        None, "--reference", help="The label that all others are compared with; by default the SPEC's, or plain LoRA's."
    ),
    peft_suite: Path | None = typer.Option(
        None,
        "--peft-suite",
        help="Also write the runs here, in the shape that PEFT's own comparison reads.",
    ),
    schema: bool = typer.Option(False, "--schema", help="Print the JSON schema of a result file, and nothing else."),
) -> None:
    """Print the table of finished runs, and draw their page anew.

    Nothing is trained. The results in RUNS/results are those that its comparison asked for; what an earlier SPEC left
    there is not among them. To put runs of several machines or SPECs together, copy their result files into the folder
    `results` of a new folder: every one of them is taken.

    Example: `rankwise report runs/mine --reference "peft.LoraConfig"`
    """
    import json

    from rankwise.compare.results import schema as result_schema
    from rankwise.errors import ArgumentError

    if schema:
        typer.echo(json.dumps(result_schema(), indent=1))
        return
    if runs is None:
        raise ArgumentError("RUNS", "be given: the output folder of a comparison", "nothing")
    _report(runs, out, reference, peft_suite)


def _report(runs: Path, out: Path | None, reference: str | None, peft_suite: Path | None) -> None:
    from rankwise.cli.compare import print_table
    from rankwise.compare.asked import read_asked
    from rankwise.compare.failures import read_failures
    from rankwise.compare.peft_suite import write_suite
    from rankwise.compare.report import write_page
    from rankwise.compare.results import read_results, result_files
    from rankwise.compare.summary import summarise
    from rankwise.errors import DataError

    found = list(result_files(runs / "results"))
    asked = read_asked(runs)
    belonging = found if asked is None else [key for key in found if key in asked.runs]
    if not belonging:
        raise DataError(f"there are no finished runs in {runs / 'results'}")
    results = read_results(runs / "results", belonging)
    rates = None
    failed: list[str] = []
    if asked is not None:
        rates = asked.rates
        reference = asked.reference if reference is None else reference
        failed = [str(failure) for failure in read_failures(runs, asked.runs)]
    print_table(summarise(results, reference, rates), results[0].metric, failed)
    if len(belonging) < len(found):
        others = len(found) - len(belonging)
        typer.echo(f"- left out of {runs / 'results'}, as of another SPEC: {others}")
    page = runs / "report.html" if out is None else out
    write_page(results, page, f"rankwise: {runs.absolute().name}", reference, rates, failed)
    typer.echo(f"page     {page}")
    if peft_suite is not None:
        written = write_suite(runs, peft_suite, belonging)
        typer.echo(f"suite    {len(written)} files in {peft_suite}")
