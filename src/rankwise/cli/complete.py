"""`rankwise complete`."""

from __future__ import annotations

from pathlib import Path

import typer


def complete(
    matrix: Path = typer.Argument(..., help="A .csv, .parquet, .npy or .npz file; empty or NaN is missing."),
    out: Path = typer.Option(..., "--out", help="Where to write: a .csv, .parquet, .npy or .npz file."),
    rank: int | None = typer.Option(None, "--rank", help="The most ranks; overestimate it. Left out: 50."),
    depth: int = typer.Option(3, "--depth", help="Factors of the deep product."),
    held_out: float = typer.Option(0.1, "--held-out", help="Share of entries held out to estimate the error."),
    seed: int = typer.Option(0, "--seed", help="Of what is held out."),
    row_names: bool | None = typer.Option(
        None, "--row-names/--no-row-names", help="Whether a CSV's first column names its rows; left out: a guess."
    ),
    column_names: bool | None = typer.Option(
        None,
        "--column-names/--no-column-names",
        help="Whether a CSV's first line names its columns; left out: a guess.",
    ),
    verbose: bool = typer.Option(False, "--verbose", help="Tell how the fit goes."),
    force: bool = typer.Option(False, "--force", help="Replace an existing file."),
) -> None:
    """Fill the missing entries of a matrix by a low rank that is found, and tell the error of held-out ones.

    An .npz may hold a scipy sparse matrix, whose absent entries are missing; the result then holds the factors B, s, A
    and the offset, and no dense matrix is formed.

    Example: `rankwise complete ratings.csv --out filled.csv`
    """
    from rankwise.completion.files import complete_file

    report = complete_file(
        matrix,
        out,
        rank=rank,
        depth=depth,
        held_out=held_out,
        seed=seed,
        verbose=verbose,
        overwrite=force,
        row_names=row_names,
        column_names=column_names,
    )
    m, n = report.shape
    typer.echo(f"matrix    {m} by {n}, {report.observed:,} entries observed ({report.observed / (m * n):.2%})")
    typer.echo(f"error     {report.held_out_error:.2e} of the norm of {report.held_out:,} held-out entries")
    typer.echo(f"constant  {report.constant_error:.2e}, if each were the mean of the others")
    typer.echo(f"rank      {report.rank} (effective rank {report.effective_rank:.1f}), offset {report.offset:.6g}")
    typer.echo(f"written   {report.out}")
