"""What commands print: one-sentence errors, and rows of a table."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NoReturn

import typer


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
