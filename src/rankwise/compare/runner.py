"""Running a plan: what is finished is skipped, what fails is recorded, and every result is written at once."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from rankwise.compare.asked import Asked, write_asked
from rankwise.compare.engines.base import Engine, Watch
from rankwise.compare.engines.here import Here
from rankwise.compare.failures import (
    FailedRunsError,
    Failure,
    failure_file,
    failure_notes,
    forget_failure,
    write_failure,
)
from rankwise.compare.lock import locked
from rankwise.compare.plan import Choice, Plan, Run
from rankwise.compare.report import markdown, write_page
from rankwise.compare.results import Result, read_results, write_result
from rankwise.compare.summary import summarise
from rankwise.compare.together import as_first, is_first
from rankwise.compare.train import checkpoints_of
from rankwise.errors import DataError
from rankwise.files import write_whole


def run_plan(plan: Plan, command: str = "", watch: Watch | None = None, engine: Engine | None = None) -> list[Result]:
    """Train every run of the plan that is not finished yet, and write the table and the page.

    Each finished run is written at once and whole to output/results, and each failed one, with its error, to
    output/failed. Start the same command again to go on, and to try failed runs again.

    Args:
        plan: the checked SPEC.
        command: what the user typed, kept with each result.
        watch: told of progress.
        engine: what carries out the runs; by default this process does, one after another.

    Returns:
        The results of this plan.

    Raises:
        RankwiseError: another process works on the same folder.
        FailedRunsError: some runs failed; raised once all others have run, and table and page are written.
    """
    watch = Watch() if watch is None else watch
    engine = Here() if engine is None else engine
    output = plan.spec.output
    asked = Asked.of(plan)
    with locked(output) if is_first() else contextlib.nullcontext():
        running = _Running(plan, engine, watch)
        try:
            if is_first():
                write_asked(asked, output)
            engine.start(plan, command, watch)
            running.run_all()
        finally:
            engine.stop()
        failures = list(running.failures.values())
        notes = failure_notes(plan, failures)
        results = finished(plan)
        if results and is_first():
            rows = summarise(results, asked.reference, asked.rates)
            write_whole(output / "table.md", markdown(rows, results[0].metric, notes))
            write_page(results, output / "report.html", f"rankwise: {output.name}", asked.reference, asked.rates, notes)
    if failures:
        raise FailedRunsError(failures, results, notes, output / "failed")
    return results


class _Running:
    """The runs of a plan on their way through an engine."""

    def __init__(self, plan: Plan, engine: Engine, watch: Watch) -> None:
        self._plan = plan
        self._engine = engine
        self._watch = watch
        self._under_way = 0
        self.results: dict[str, Result] = {}
        """Finished runs, by key."""
        self.failures: dict[str, Failure] = {}
        """Failed runs, by key."""

    def run_all(self) -> None:
        """Run what is not finished; the other seeds of a searched method follow as soon as its own search has ended."""
        searching = [choice for choice in self._plan.choices if not choice.settled]
        self._submit(self._plan.runs)
        while True:
            for choice in [choice for choice in searching if self._has_searched(choice)]:
                searching.remove(choice)
                self._submit(self._chosen(choice))
            if self._under_way == 0:
                return
            ended = self._engine.next_ended()
            self._under_way -= 1
            if isinstance(ended.outcome, Failure):
                self._fail(ended.run, ended.outcome)
            else:
                self._finish(ended.run, ended.outcome)

    def _submit(self, runs: Iterable[Run]) -> None:
        """Hand runs to the engine, but for those that are finished already."""
        for run in runs:
            file = _file(self._plan.spec.output, run)
            if as_first(file.exists()):
                (self.results[run.key],) = read_results(file.parent, [run.key])
                self._watch.finished(run, self.results[run.key])
            else:
                self._engine.submit(run)
                self._under_way += 1

    def _has_searched(self, choice: Choice) -> bool:
        return all(run.key in self.results or run.key in self.failures for run in self._plan.search_of(choice))

    def _chosen(self, choice: Choice) -> tuple[Run, ...]:
        """The other seeds of a method whose search has ended, at the best rate; none where every rate failed."""
        found = [self.results[run.key] for run in self._plan.search_of(choice) if run.key in self.results]
        return self._plan.chosen_runs(choice, found) if found else ()

    def _finish(self, run: Run, result: Result) -> None:
        """Write a result; its checkpoints and an earlier failure are of no use any more."""
        output = self._plan.spec.output
        if is_first():
            try:
                write_result(result, _file(output, run))
            except DataError as error:
                self._fail(run, Failure.of(run, error))
                return
            shutil.rmtree(checkpoints_of(output, run), ignore_errors=True)
            forget_failure(failure_file(output, run))
        self.results[run.key] = result
        self._watch.finished(run, result)

    def _fail(self, run: Run, failure: Failure) -> None:
        """Write a failure down, and go on with the others."""
        self.failures[run.key] = failure
        if is_first():
            write_failure(failure, failure_file(self._plan.spec.output, run))
        self._watch.failed(run, failure)


def finished(plan: Plan) -> list[Result]:
    """The results of the plan's own runs; what an edited SPEC left in the folder is not among them."""
    folder = plan.spec.output / "results"
    every = [run for choice in plan.choices for run in choice.runs]
    keys = [run.key for run in every if _file(plan.spec.output, run).exists()]
    return read_results(folder, keys) if keys else []


def _file(output: Path, run: Run) -> Path:
    return output / "results" / f"{run.key}.json"
