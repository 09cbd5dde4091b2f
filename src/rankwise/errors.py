"""The errors rankwise raises: few classes, all `ValueError`s, each message one sentence.

A message names the argument, the rule it broke and the value that was seen, so that the reader can mend the call
without opening the source.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankwiseError(ValueError):
    """Base of every error rankwise raises on purpose."""


class ArgumentError(RankwiseError):
    """An argument, a field of a config or a key of a SPEC breaks its rule.

    Args:
        argument: its name, as the caller wrote it.
        rule: what it must be, completing the sentence "`argument` must …".
        seen: the value that was found.

    >>> raise ArgumentError("r", "be at least 1", 0)
    Traceback (most recent call last):
    rankwise.errors.ArgumentError: `r` must be at least 1; found 0
    """

    def __init__(self, argument: str, rule: str, seen: object) -> None:
        super().__init__(f"`{argument}` must {rule}; found {seen!r}")


class TrainingError(RankwiseError):
    """A training loop in which the method's rules cannot run, or have been bypassed."""


class DataError(RankwiseError):
    """A data file that is missing, empty, or does not hold what the SPEC says."""


class AdapterFileError(RankwiseError):
    """A saved adapter that is incomplete, of another kind, or from an unknown format."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The `known` names closest to `name`, as the tail of an error message.

    >>> nearest("adalor", ["lora", "adalora", "sora"])
    'the nearest names are adalora, lora, sora'
    """
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.0)
    return f"the nearest names are {', '.join(close)}" if close else "there are no names to choose from"
