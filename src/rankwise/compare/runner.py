"""Running a plan: finished runs are kept and skipped, and several machines may share one output folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rankwise.compare.plan import Plan, Run
from rankwise.compare.report import markdown, write_page
from rankwise.compare.results import Result, read_results, write_result
from rankwise.compare.summary import summarise
from rankwise.compare.together import as_first, is_first
from rankwise.compare.train import checkpoints_of, train_run
from rankwise.files import write_whole

STALE = 600.0
"""Seconds without a sign of life after which another machine's claim on a run is taken over."""

Watch = Callable[[Run, int], None]
"""Told of progress: the run, and optimiser steps newly done (those of a run found finished at once)."""


def run_plan(plan: Plan, command: str, watch: Watch = lambda run, steps: None) -> list[Result]:
    """Train every run of the plan that is not finished yet, and write the table and the page.

    Each finished run is written at once and whole to output/results; a run that another process works on is left to
    it. Start the same command again, here or on another machine that shares the folder, to go on.

    Returns:
        The results of this plan that exist by now.
    """
    for run in plan.runs:
        _settle(plan, run, command, watch)
    # A method whose rate is searched goes on with its other seeds once the rate is known.
    for run in plan.chosen_runs(finished(plan)):
        _settle(plan, run, command, watch)
    results = finished(plan)
    if results and is_first():
        output = plan.spec.output
        reference = plan.spec.reference
        write_whole(output / "table.md", markdown(summarise(results, reference), results[0].metric))
        write_page(results, output / "report.html", title=f"rankwise: {output.name}", reference=reference)
    return results


def _settle(plan: Plan, run: Run, command: str, watch: Watch) -> None:
    """Train a run, unless it is finished or another process works on it."""
    output = plan.spec.output
    file = _file(output, run)
    if as_first(file.exists()):
        watch(run, plan.steps)
        return
    with _claimed(file.with_suffix(".claim")) if is_first() else contextlib.nullcontext(False) as mine:
        if not as_first(mine and not file.exists()):
            watch(run, plan.steps)
            return
        result = train_run(plan, run, output, command, lambda steps: watch(run, steps))
        if is_first():
            write_result(result, file)
            shutil.rmtree(checkpoints_of(output, run), ignore_errors=True)


def finished(plan: Plan) -> list[Result]:
    """The results of the plan's own runs; what an edited SPEC left in the folder is not among them."""
    folder = plan.spec.output / "results"
    every = [run for choice in plan.choices for run in choice.runs]
    keys = [run.key for run in every if _file(plan.spec.output, run).exists()]
    return read_results(folder, keys) if keys else []


def _file(output: Path, run: Run) -> Path:
    return output / "results" / f"{run.key}.json"


@contextlib.contextmanager
def _claimed(claim: Path) -> Iterator[bool]:
    """Hold a run for this process; False if a living process holds it."""
    claim.parent.mkdir(parents=True, exist_ok=True)
    owner = f"{socket.gethostname()} {os.getpid()}\n"
    with contextlib.suppress(FileNotFoundError):
        if _is_dead(claim):
            claim.unlink()
    try:
        with claim.open("x") as mark:
            mark.write(owner)
    except FileExistsError:
        yield False
        return
    released = threading.Event()
    threading.Thread(target=_keep_alive, args=(claim, released), daemon=True).start()
    try:
        yield True
    finally:
        released.set()
        with contextlib.suppress(FileNotFoundError):
            if claim.read_text() == owner:  # not so where it went stale and another process took over
                claim.unlink()


def _keep_alive(claim: Path, released: threading.Event) -> None:
    """A sign of life every minute, also while a run scores, saves or loads."""
    while not released.wait(STALE / 10):
        with contextlib.suppress(OSError):
            os.utime(claim)


def _is_dead(claim: Path) -> bool:
    """Whether the claim's process is known to be gone: on this machine by its id, elsewhere by its silence."""
    if time.time() - claim.stat().st_mtime > STALE:
        return True
    host, _, process = claim.read_text().strip().rpartition(" ")
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
