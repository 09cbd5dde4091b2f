"""What commands print: one-sentence errors, progress with the time left, and rows of a table."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from rankwise.compare.plan import Run

QUIET_SECONDS = 15.0
"""Where output is not a terminal, a line of progress at most this often."""
STEPS_TO_ESTIMATE = 20
"""The latest steps whose median time tells the time left; before that many, nothing is told."""


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
    """Progress over all the runs of a plan, on standard error: a bar, or a line now and then.

    The time left is the median of the latest steps' times, for all steps that are left. It is not told before there are
    enough steps to tell it from: the first ones of a run take longer, and loading a model is no step.
    """

    def __init__(self, runs: int, steps: int) -> None:
        self._runs, self._total = runs, runs * steps
        self._done = 0
        self._seen = set[str]()
        self._step_seconds: deque[float] = deque(maxlen=STEPS_TO_ESTIMATE)
        self._last_step = self._last_line = time.monotonic()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[left]}"), console=console)
        self._task = self._bar.add_task("starting", total=self._total, left="")
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
        now = time.monotonic()
        first_of_run = run.key not in self._seen
        self._seen.add(run.key)
        self._done += steps
        # A run's first step has its loading in it, and several steps at once were found done.
        if steps == 1 and not first_of_run:
            self._step_seconds.append(now - self._last_step)
        self._last_step = now
        what = f"{run.label}, seed {run.seed} ({len(self._seen)}/{self._runs})"
        if self._live:
            self._bar.update(self._task, description=what, completed=self._done, left=self._left())
        elif now - self._last_line > QUIET_SECONDS:
            self._last_line = now
            left = self._left()
            typer.echo(f"{what}: {self._done}/{self._total} steps{left and ', ' + left}", err=True)

    def _left(self) -> str:
        """The time left in words; nothing while too few steps are known to tell it from."""
        if len(self._step_seconds) < STEPS_TO_ESTIMATE or self._done >= self._total:
            return ""
        seconds = statistics.median(self._step_seconds) * (self._total - self._done)
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
