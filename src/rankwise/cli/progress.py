"""Progress over the runs of a comparison, on standard error: a live table, or a line now and then."""

from __future__ import annotations

import statistics
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from rankwise.compare.engines import Watch

if TYPE_CHECKING:
    from rankwise.compare.failures import Failure
    from rankwise.compare.plan import Choice, Plan, Run
    from rankwise.compare.results import Result

QUIET_SECONDS = 15.0
"""Where output is not a terminal, a line of progress at most this often."""
STEPS_TO_ESTIMATE = 20
"""The latest steps whose median time tells the time left; before that many, nothing is told."""
REFRESHES_PER_SECOND = 2
"""How often the live table is drawn."""


class TimeLeft:
    """The time left, from the latest steps.

    It is the median of their times, for all steps that are left, divided among the runs that are under way. The first
    step of a run does not count, since the run's loading is in it.
    """

    def __init__(self) -> None:
        self._step_seconds: deque[float] = deque(maxlen=STEPS_TO_ESTIMATE)
        self._latest: dict[str, tuple[int, float]] = {}

    def at_step(self, run: Run, step: int) -> None:
        """So many steps of a run are done."""
        now = time.monotonic()
        before, then = self._latest.get(run.key, (0, now))
        # A run that has gone back to a checkpoint, or has loaded its model, starts to be measured here.
        if before and step > before:
            self._step_seconds.extend([(now - then) / (step - before)] * min(step - before, STEPS_TO_ESTIMATE))
        self._latest[run.key] = (step, now)

    def ended(self, run: Run) -> None:
        """A run is not under way any more."""
        self._latest.pop(run.key, None)

    def told(self, steps_left: int) -> str:
        """In words; nothing while too few steps are known to tell it from."""
        if len(self._step_seconds) < STEPS_TO_ESTIMATE or not steps_left:
            return ""
        at_a_time = max(1, len(self._latest))
        seconds = statistics.median(self._step_seconds) * steps_left / at_a_time
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


class Watching(Watch):
    """Shows how the runs of a plan get on.

    On a terminal it is a bar of all steps above a table of methods and seeds, whose last rows a low window cuts off;
    elsewhere a line now and then.

    Args:
        plan: the runs.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._total = plan.count * plan.steps
        self._steps: dict[str, int] = {}
        """Steps done, of each run that has started."""
        self._states: dict[str, str] = {run.key: "waiting" for choice in plan.choices for run in choice.runs}
        """What the table says of each run."""
        self._ended: set[str] = set()
        self._results: dict[str, Result] = {}
        self._time_left = TimeLeft()
        self._last_line = time.monotonic()

        self._console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=self._console)
        self._task = self._bar.add_task("", total=self._total, left="")
        self._live = Live(
            get_renderable=lambda: Group(self._bar, self.table()),
            console=self._console,
            refresh_per_second=REFRESHES_PER_SECOND,
        )

    def __enter__(self) -> Watching:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def at_step(self, run: Run, step: int) -> None:
        """So many steps of a run are done."""
        self._steps[run.key] = step
        self._states[run.key] = f"{step}/{self._plan.steps}" if step else "loading"
        self._time_left.at_step(run, step)
        self._tell(run)

    def finished(self, run: Run, result: Result) -> None:
        """A run is finished, or was found finished."""
        self._results[run.key] = result
        self._end(run, f"{result.score:.3f}")

    def failed(self, run: Run, failure: Failure) -> None:
        """A run has failed; this is told at once."""
        self._console.print(Text(str(failure)))
        self._end(run, "failed")

    def _end(self, run: Run, state: str) -> None:
        self._steps[run.key] = self._plan.steps
        self._states[run.key] = state
        self._ended.add(run.key)
        self._time_left.ended(run)
        self._tell(run)

    def _tell(self, run: Run) -> None:
        """Where there is no terminal, a line about a run, unless the latest line is fresh."""
        done = sum(self._steps.values())
        left = self._time_left.told(self._total - done)
        self._bar.update(self._task, completed=done, left=left)
        now = time.monotonic()
        if self._console.is_terminal or now - self._last_line <= QUIET_SECONDS:
            return
        self._last_line = now
        what = f"{run.label}, seed {run.seed} ({len(self._steps)}/{self._plan.count})"
        typer.echo(f"{what}: {done}/{self._total} steps{left and ', ' + left}", err=True)

    # --- the live table ----------------------------------------------------------------------------------------------

    def table(self) -> Table:
        """A row for each method, a column for each seed."""
        shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        shown.add_column("method", overflow="fold")
        for seed in self._plan.spec.seeds:
            shown.add_column(f"seed {seed}", no_wrap=True)
        for choice in self._plan.choices:
            cells = [self._cell(choice, seed) for seed in self._plan.spec.seeds]
            # As Text: a label in square brackets is no markup.
            shown.add_row(Text(choice.label), *(Text(cell) for cell in cells))
        return shown

    def _cell(self, choice: Choice, seed: int) -> str:
        """How the runs of one method and seed get on, with the rate where there are several."""
        runs = choice.runs_with(seed)
        if choice.settled:
            return self._states[runs[0].key]
        if seed != self._plan.spec.seeds[0]:
            # Of the rates, these seeds run at the one that the search has found, once it is known.
            runs = [run for run in runs if self._states[run.key] != "waiting"]
        elif all(run.key in self._ended for run in runs):
            # A search that is over is told by its best rate.
            found = [run for run in runs if run.key in self._results]
            runs = sorted(found, key=lambda run: self._results[run.key].validation_quality)[-1:] or runs
        return "\n".join(f"{run.learning_rate:g}: {self._states[run.key]}" for run in runs) or "waiting"
