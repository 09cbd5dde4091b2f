"""`rankwise shrink`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rankwise.cli.output import by_kind, print_modules, span

if TYPE_CHECKING:
    from rankwise.export.shrink import ShrinkReport

LONGEST = 512
"""Tokens of a calibration text that are read."""
TOGETHER = 8
"""Calibration texts a batch."""
AFFORDABLE = 4 * 2**30
"""Bytes of second moments up to which they are taken in full; beyond, their diagonals."""


def shrink(
    adapter: Path = typer.Argument(..., help="A plain LoRA adapter, of PEFT or exported."),
    out: Path = typer.Option(..., "--out", help="Folder to write."),
    energy: float | None = typer.Option(None, "--energy", help="Share of each module's Σ σ² to keep, as 0.99."),
    budget: float | None = typer.Option(None, "--budget", help="Numbers in all modules together; below 1, a share."),
    rank: int | None = typer.Option(None, "--rank", help="One rank for all modules."),
    layout: str = typer.Option("compact", "--layout", help="compact: own ranks; uniform: one rank, padded."),
    base: str | None = typer.Option(None, "--base", help="The base model, if not where the adapter says."),
    calibration: Path | None = typer.Option(
        None, "--calibration", help='Texts to be best on: a line each, or JSONL with "text".'
    ),
    dtype: str | None = typer.Option(
        None, "--dtype", help="float32, bfloat16 or float16; by default what the adapter has."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing folder."),
    every: bool = typer.Option(False, "--all", help="A row for every module."),
) -> None:
    """Write a smaller LoRA adapter with the best updates of lower rank.

    Give one of --energy, --budget and --rank.

    Example: `rankwise shrink runs/lora --budget 0.5 --out runs/small`
    """
    from rich.console import Console

    from rankwise.errors import ArgumentError
    from rankwise.export.shrink import shrink_adapter

    moments = None
    if calibration is not None:
        if base is None:
            raise ArgumentError("--calibration", "come together with --base", str(calibration))
        moments = _moments(adapter, base, calibration)
    report = shrink_adapter(
        adapter,
        out,
        energy=energy,
        budget=budget,
        rank=rank,
        second_moments=moments,
        layout=layout,
        base=base,
        dtype=dtype,
        overwrite=force,
    )
    columns = ("module", "modules", "rank", "→ kept", "mean", "largest error")
    print_modules(Console(), columns, _rows(report, every))
    typer.echo(f"error    {report.relative_error:.2%} of ‖ΔW‖_F, read back from the file")
    kept = report.parameters / report.parameters_before
    typer.echo(f"numbers  {report.parameters_before:,} → {report.parameters:,} ({kept:.1%})")
    typer.echo(f"adapter  {report.folder}")


def _rows(report: ShrinkReport, every: bool) -> list[list[str]]:
    """A row for each name that differs only in layer numbers, or for every module."""
    rows: list[list[str]] = []
    for kind, names in by_kind(report.ranks, every).items():
        before, after = [[ranks[name] for name in names] for ranks in (report.ranks_before, report.ranks)]
        mean = f"{sum(after) / len(after):.1f}"
        worst = f"{max(report.errors[name] for name in names):.2%}"
        rows.append([kind, str(len(names)), span(before), span(after), mean, worst])
    return rows


def _moments(adapter: Path, base: str, calibration: Path) -> dict[str, Any]:
    """Second moments of the base model's inputs to the adapter's modules, over the texts."""
    import torch

    from rankwise.base_models import open_model, open_tokenizer
    from rankwise.cli.compare import quiet_libraries
    from rankwise.errors import AdapterFileError
    from rankwise.export.base import told_base, trained_as
    from rankwise.export.moments import WIDEST, second_moments_of
    from rankwise.export.names_today import with_names_of
    from rankwise.export.reader import read_lora

    quiet_libraries()
    texts, plain = _texts(calibration), read_lora(adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, revision = told_base(base, plain.config, adapter)
    task, made_for = plain.config.get("task_type"), trained_as(plain.config)
    model: Any = open_model(name, task, revision=revision, trained_as=made_for, argument="--base", dtype="auto")
    model = model.to(device).eval()
    plain = with_names_of(model, plain, adapter)
    unknown = sorted(plain.updates.keys() - dict(model.named_modules()).keys())
    if unknown:
        raise AdapterFileError(f"the base model {base!r} has no module {unknown[0]!r}: is it the right base?")
    tokenizer = open_tokenizer(name, revision=revision, argument="--base")
    longest = min(LONGEST, tokenizer.model_max_length)

    def batches() -> Any:
        for start in range(0, len(texts), TOGETHER):
            some = texts[start : start + TOGETHER]
            yield dict(
                tokenizer(some, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
            )

    widths = [f.A.shape[1] for f in plain.updates.values()]
    full = sum(8 * width**2 for width in widths if width <= WIDEST) <= AFFORDABLE
    typer.echo(f"weighted by {'full' if full else 'diagonal'} second moments over {len(texts)} texts", err=True)
    return second_moments_of(model, batches(), plain.updates, full=full)


def _texts(file: Path) -> list[str]:
    """The texts of a calibration file; empty lines are none."""
    from rankwise.errors import DataError

    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [json.loads(line)["text"] for line in lines] if file.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f'a line lacks "text" or is no JSON object ({type(error).__name__})'
        raise DataError(f"{file} cannot be read: {error.strerror if isinstance(error, OSError) else reason}") from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{file} must hold texts, at least one; found {'other values' if texts else 'none'}")
    return texts
