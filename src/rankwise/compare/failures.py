"""Runs that failed: what is written down of each, and the sentences that a table, a page and a terminal say."""

from __future__ import annotations

import json
import platform
import traceback
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.errors import DataError, RankwiseError
from rankwise.files import write_whole

if TYPE_CHECKING:
    from rankwise.compare.plan import Plan, Run
    from rankwise.compare.results import Result

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that ended in an error."""

    key: str
    label: str
    seed: int
    learning_rate: float
    error: str
    """The kind of error and the first line of its message."""
    machine: str
    """The name of the machine that the run was on."""
    traceback: str

    @classmethod
    def of(cls, run: Run, error: BaseException) -> Failure:
        """What is kept of an error that a run has just ended in."""
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        return cls(
            key=run.key,
            label=run.label,
            seed=run.seed,
            learning_rate=run.learning_rate,
            error=f"{type(error).__name__}: {first_line}",
            machine=platform.node(),
            traceback="".join(traceback.format_exception(error)),
        )

    def __str__(self) -> str:
        return f"failed: {self.label}, seed {self.seed}, learning rate {self.learning_rate:g}: {self.error}"


class FailedRunsError(RankwiseError):
    """Raised when everything else has run: some runs failed.

    Args:
        failures: the failed runs, at least one.
        results: the results that exist all the same.
        notes: what a table of these results has to say.
        folder: where the whole errors are.
    """

    def __init__(
        self, failures: Sequence[Failure], results: Sequence[Result], notes: Sequence[str], folder: Path
    ) -> None:
        runs = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
        super().__init__(
            f"{runs} failed; {folder} has the whole errors, and the same command tries again; the first {failures[0]}"
        )
        self.failures = list(failures)
        self.results = list(results)
        self.notes = list(notes)


def failure_file(output: Path, run: Run) -> Path:
    """Where a run's failure is written down."""
    return output / "failed" / f"{run.key}.json"


def write_failure(failure: Failure, path: Path) -> None:
    """Write one failure as JSON, whole or not at all."""
    write_whole(path, json.dumps({"format": FORMAT, **asdict(failure)}, indent=1) + "\n")


def read_failures(output: Path, keys: Container[str]) -> list[Failure]:
    """The failures that are still written down of these runs, which nobody has run again with success.

    Raises:
        DataError: a file is not what `write_failure` writes.
    """
    failures: list[Failure] = []
    for path in sorted((output / "failed").glob("*.json")):
        if path.stem not in keys:
            continue
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields.pop("format")
            failures.append(Failure(**fields))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{path} is not whole: {error}") from error
    return failures


def forget_failure(path: Path) -> None:
    """Remove what was written of an earlier failure, and the folder once it is empty."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def failure_notes(plan: Plan, failures: Sequence[Failure]) -> list[str]:
    """What has to be said beside the results of a plan: which runs failed, and what that did to the search of rates."""
    failed = {failure.key for failure in failures}
    notes = [str(failure) for failure in failures]
    for choice in plan.choices:
        search = plan.search_of(choice)
        missing = sum(run.key in failed for run in search)
        if choice.settled or not missing:
            continue
        if missing < len(search):
            notes.append(f"{choice.label}: its learning rate is the best of those that ran; {missing} failed")
        elif len(plan.spec.seeds) > 1:
            notes.append(f"{choice.label}: its other seeds have not run, since every rate of its search failed")
    return notes
