"""Errors are `ValueError`s of one sentence that name the argument, the rule and the value."""

from __future__ import annotations

import pytest

from rankwise import errors


def test_argument_error_names_argument_rule_and_value() -> None:
    error = errors.ArgumentError("r", "be at least 1", 0)
    assert str(error) == "`r` must be at least 1; found 0"


@pytest.mark.parametrize("kind", ["ArgumentError", "TrainingError", "DataError", "AdapterFileError", "RankwiseError"])
def test_every_error_is_a_value_error(kind: str) -> None:
    assert issubclass(getattr(errors, kind), ValueError)


def test_nearest_names_come_first() -> None:
    assert errors.nearest("querry", ["value", "query", "key"]).startswith("the nearest names are query")
    assert errors.nearest("x", []) == "there are no names to choose from"
