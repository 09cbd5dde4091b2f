"""Rules that arguments keep, each raising `ArgumentError` with the argument, the rule and the value seen."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rankwise.errors import ArgumentError


def require_int(argument: str, value: object, *, least: int) -> None:
    """Raise unless `value` is a whole number ≥ `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(argument, f"be a whole number ≥ {least}", value)


def require_bool(argument: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ArgumentError(argument, "be True or False", value)


def require_number(argument: str, value: object, *, least: float = 0.0, below: float = math.inf) -> None:
    """Raise unless `value` is a finite number in [least, below)."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or not least <= number < below:
        rule = f"be a number ≥ {least:g}" if below == math.inf else f"be a number in [{least:g}, {below:g})"
        raise ArgumentError(argument, rule, value)


def require_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ArgumentError(argument, f"be one of {', '.join(choices)}", value)


def require_batch(argument: str, value: object) -> None:
    """Raise unless `value` is None, a mapping of model inputs, or a function of the model."""
    if value is not None and not callable(value) and not isinstance(value, Mapping):
        raise ArgumentError(argument, "be a mapping of model inputs or a function of the model", value)


def require_room(argument: str, out: Path, *, overwrite: bool, reads: Iterable[str | Path] = ()) -> None:
    """`out` must be free, or a folder to be replaced, and hold nothing that is read."""
    for read in reads:
        at = Path(read).resolve()
        if out.resolve() in (at, *at.parents):
            raise ArgumentError(argument, f"be another folder than {str(read)!r}, and not one around it", str(out))
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise ArgumentError(argument, "not exist yet, unless it may be replaced (--force, or overwrite=True)", str(out))
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ArgumentError(argument, "be a folder", str(out))


@functools.cache
def say_once(sentence: str) -> None:
    """Warn, the first time in this process."""
    warnings.warn(sentence, stacklevel=6)
