"""`rankwise merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rankwise.errors import ArgumentError

if TYPE_CHECKING:
    from rankwise.export.merge import MergeReport


def merge(
    adapters: list[Path] = typer.Argument(..., help="Folders of adapters of one base model, plain LoRA or rankwise."),
    out: Path = typer.Option(..., "--out", help="Where to write."),
    weights: str | None = typer.Option(None, "--weights", help="One per adapter, as 0.5,0.5; by default 1/n each."),
    rank: int | None = typer.Option(None, "--rank", help="The most ranks of a module."),
    private: tuple[float, float] | None = typer.Option(
        None, "--private", metavar="EPSILON DELTA", help="Hide any one adapter's part in noise."
    ),
    clip: float | None = typer.Option(None, "--clip", help="Scale each adapter to at most this norm; with --private."),
    base: str | None = typer.Option(None, "--base", help="The base model, if not where the adapters say."),
    layout: str = typer.Option("uniform", "--layout", help='"uniform" or "compact", as in exports.'),
    into_base: bool = typer.Option(False, "--into-base", help="Write the whole base model with the merge in it."),
    dtype: str | None = typer.Option(
        None, "--dtype", help="float32, bfloat16 or float16; by default what was given has."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing folder."),
) -> None:
    """Merge adapters by weights: exactly, at a smaller rank, privately, or into the base model.

    Example: `rankwise merge one two --out merged --weights 0.7,0.3`
    """
    given = None if weights is None else _numbers(weights)
    if into_base:
        for name, value in {"--rank": rank, "--private": private, "--clip": clip}.items():
            if value is not None:
                raise ArgumentError(name, "come without --into-base: merge first, then merge the result in", value)
        from rankwise.export.into_base.merge import merge_into_base

        made = merge_into_base(adapters, base, out, weights=given, dtype=dtype, overwrite=force)
        typer.echo(f"model    {made}")
        return
    from rankwise.export.merge import merge_adapters

    _show(
        merge_adapters(
            adapters,
            out,
            weights=given,
            rank=rank,
            privacy=private,
            clip=clip,
            base=base,
            layout=layout,
            dtype=dtype,
            overwrite=force,
        )
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ArgumentError("--weights", "be numbers between commas, as 0.5,0.5", text) from error


def _show(report: MergeReport) -> None:
    typer.echo(f"adapter  {report.folder} (rank {report.rank})")
    typer.echo(f"error    {report.relative_error:.2e} of the merge's norm")
    if report.guarantee is not None:
        promise = report.guarantee
        typer.echo(f"private  ε = {promise.epsilon:g}, δ = {promise.delta:g}; its terms are in README.md there")
        typer.echo(f"noise    {promise.noise_to_signal:.3g} times the merge's norm (for you only: not to be published)")
