"""`rankwise train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import typer

from rankwise.cli.output import Watching


def train(
    spec: Path = typer.Argument(..., help="The SPEC, a TOML file with one method and one seed."),
    out: Path | None = typer.Option(None, "--out", help="Write here instead of the SPEC's `output`."),
) -> None:
    """Train one method on your data; write the adapter, its plain-LoRA export and a page of plots.

    Example: `rankwise train spec.toml --out runs/intents`
    """
    from rankwise.cli.compare import run_and_show
    from rankwise.compare.spec import read_spec
    from rankwise.errors import ArgumentError

    read = read_spec(spec)
    for name, entries in (("methods", [entry.name for entry in read.methods]), ("seeds", list(read.seeds))):
        if len(entries) != 1:
            raise ArgumentError(name, "hold exactly one entry for `train` (`rankwise compare` takes several)", entries)
    read = read if out is None else dataclasses.replace(read, output=out.absolute())
    run_and_show(read, f"rankwise train {spec}", Watching)
