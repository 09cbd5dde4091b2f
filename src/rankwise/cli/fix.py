"""`rankwise fix`."""

from __future__ import annotations

from pathlib import Path

import typer


def fix(
    folder: Path = typer.Argument(..., help="A LoRA adapter, of PEFT or rankwise."),
    out: Path = typer.Option(..., "--out", help="Folder to write."),
    base: str | None = typer.Option(None, "--base", help="The base model, to compare logits: a folder or hub id."),
    dtype: str | None = typer.Option(
        None, "--dtype", help="float32, bfloat16 or float16; by default what each tensor has."
    ),
    force: bool = typer.Option(False, "--force", help="Replace an existing folder."),
) -> None:
    """Write an adapter again so that PEFT and servers read it: names, prefix, pickle, dtype.

    Example: `rankwise fix runs/compiled --out runs/mended`
    """
    from rankwise.cli.compare import quiet_libraries
    from rankwise.export.fix import fix_adapter

    quiet_libraries()
    report = fix_adapter(folder, out, base=base, dtype=dtype, overwrite=force)
    for change in report.changes or ("nothing to mend",):
        typer.echo(change)
    if report.logits_error is not None:
        typer.echo(f"logits   differ by {report.logits_error:.1e} of their largest")
    if report.not_compared is not None:
        typer.echo(f"logits   were not compared: {report.not_compared}")
    typer.echo(f"adapter  {report.folder}")
