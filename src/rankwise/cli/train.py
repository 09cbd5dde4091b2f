"""`rankwise train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rankwise.compare.spec import Spec


def train(
    spec: Path = typer.Argument(..., help="The SPEC, a TOML file with one method and one seed."),
    out: Path | None = typer.Option(None, "--out", help="Write here instead of the SPEC's `output`."),
    processes: int = typer.Option(
        1, "--processes", min=1, help="Train on so many at a time (DDP); each takes its part of every batch."
    ),
) -> None:
    """Train one method on your data; write the adapter, its plain-LoRA export and a page of plots.

    Example: `rankwise train spec.toml --out runs/intents`
    """
    from rankwise.cli.compare import run_and_show
    from rankwise.compare.spec import HEAD, read_spec
    from rankwise.errors import ArgumentError

    read = read_spec(spec)
    for name, entries in (("methods", [entry.name for entry in read.entries]), ("seeds", list(read.seeds))):
        if len(entries) != 1:
            raise ArgumentError(name, "hold exactly one entry for `train` (`rankwise compare` takes several)", entries)
    if read.entries[0].name == HEAD:
        rule = "be a method with an adapter for `train` (the head alone is what `rankwise compare` compares with)"
        raise ArgumentError("methods", rule, HEAD)
    read = read if out is None else read.with_output(out)
    if processes > 1:
        _launch(spec, out, processes, read)
    run_and_show(read, f"rankwise train {spec}")


def _launch(spec: Path, out: Path | None, processes: int, read: Spec) -> NoReturn:
    import torch

    from rankwise.cli.compare import quiet_libraries
    from rankwise.compare.lock import locked
    from rankwise.compare.plan import make_plan
    from rankwise.compare.together import launch
    from rankwise.errors import ArgumentError

    batch = read.training.batch_size
    if batch % processes:
        raise ArgumentError("processes", f"divide the SPEC's batch_size, {batch}", processes)
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise ArgumentError("processes", f"be at most the number of GPUs, {gpus}", processes)
    quiet_libraries()
    # What is wrong is said once, before processes start.
    make_plan(read)
    with locked(read.output):
        pass
    raise typer.Exit(launch(processes, ["train", str(spec), *([] if out is None else ["--out", str(out)])]))
