"""One process at a time over an output folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from rankwise.errors import RankwiseError

LOCK = ".lock"
"""The file in an output folder that is locked; it stays, and means nothing, when no process holds it."""


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Have an output folder, which is made, for this process alone. The system ends the lock with the process.

    Raises:
        RankwiseError: another process has it.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RankwiseError(f"{output} is in use by another process: wait for its end, or write elsewhere") from error
    try:
        yield
    finally:
        lock.release()
