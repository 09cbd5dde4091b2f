"""What commands print: one-sentence errors, progress with the time left, and rows of a table."""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rankwise.compare.plan import Run

QUIET_SECONDS = 15.0
"""Where output is not a terminal, a line of progress at most this often."""


def stop(error: Exception) -> NoReturn:
    """Print an error and leave with exit code 2."""
    typer.echo(f"rankwise: {error}", err=True)
    sys.exit(2)


def by_kind(names: Iterable[str], every: bool) -> dict[str, list[str]]:
    """Module names that differ only in layer numbers, together; each alone if `every`."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[name if every else re.sub(r"(?<![^.])\d+(?![^.])", "*", name)].append(name)
    return kinds


def span(values: Sequence[float], form: str = "") -> str:
    """The least and the largest of some numbers, as one where they look the same."""
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least}–{most}"


class Watching:
    """Progress over all the runs of a plan, on standard error: a bar, or a line now and then."""

    def __init__(self, runs: int, steps: int) -> None:
        self._runs, self._steps, self._total = runs, steps, runs * steps
        self._done, self._seen, self._trained = 0, set[str](), 0
        self._began = self._last = time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("starting", total=self._total)
        self._live = console.is_terminal

    def __enter__(self) -> Watching:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()

    def __call__(self, run: Run, steps: int) -> None:
        """`steps` more optimiser steps of `run` are done."""
        self._seen.add(run.key)
        self._done += steps
        self._trained += steps == 1
        what = f"{run.label}, seed {run.seed} ({len(self._seen)}/{self._runs})"
        if self._live:
            self._bar.update(self._task, description=what, completed=self._done)
        elif time.monotonic() - self._last > QUIET_SECONDS:
            self._last = time.monotonic()
            typer.echo(f"{what}: {self._done}/{self._total} steps, about {self._left()} left", err=True)

    def _left(self) -> str:
        seconds = (time.monotonic() - self._began) / max(1, self._trained) * (self._total - self._done)
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
