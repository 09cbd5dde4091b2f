"""What commands print: one-sentence errors, and rows of a table."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console


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


def print_modules(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column has module names; where these are too long, lines break at their dots.

    Args:
        console: where to print.
        columns: their headings.
        rows: their cells.
    """
    from rich.table import Table

    numbers = Table(*columns[1:])
    for row in rows:
        numbers.add_row(*row[1:])
    # A border and a space on either side of a name, less the border that a table of numbers begins with.
    room = console.width - console.measure(numbers).maximum - 3
    table = Table(*columns)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for first, *others in rows:
        table.add_row(broken_at_dots(first, room), *others)
    console.print(table)


def broken_at_dots(name: str, width: int) -> str:
    """A module's name in lines of at most `width`, each but the last with a dot at its end.

    >>> broken_at_dots("encoder.layer.*.attention", 16).splitlines()
    ['encoder.layer.*.', 'attention']
    """
    lines = [""]
    for part in re.findall(r"[^.]*\.?", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
