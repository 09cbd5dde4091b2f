"""docs/equations.md stays true: its names and tests exist, and no numbered statement of a paper is left out."""

from __future__ import annotations

import ast
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")

NUMBERS = {
    "NNM-LoRA": "(1)–(11)",
    "NB-LoRA": ", ".join(f"claim {n}" for n in range(1, 10)),
    "SoRA": "(5)–(12)",
    "ALoRA": "(6), algorithm 1",
    "AdaLoRA": "(1), (3)–(11), algorithm 1",
    "SaLoRA": "(4)–(12), algorithm 1",
    "SORSA": "(1)–(39), theorem 1, theorem 2, theorem 3, lemma 4, theorem 5, listing 1, listing 2",
    "Deep LoRA": "(1)–(21), theorem 2.1, proposition 2.2, lemma E.1, lemma E.2",
}
"""Every number in the papers' texts, by section of the page: read from the papers, not from the page."""

HEADER = ["number", "what it says", "where", "test", "note"]
ONE_NUMBER = r"\((\d+)\)(?:–\((\d+)\))?|((?:theorem|lemma|proposition|algorithm|listing|claim) [\w.]+)"
SECTIONS = pytest.mark.parametrize("paper", NUMBERS)


class Row(NamedTuple):
    number: str
    says: str
    where: str
    test: str
    note: str


def numbers(cell: str) -> list[str]:
    """The numbers a cell names, ranges written out; an unnumbered row has none."""
    found: list[str] = []
    for part in cell.split(", "):
        match = re.fullmatch(ONE_NUMBER, part)
        if match:
            first, last, named = match.groups()
            found += [named] if named else [f"({n})" for n in range(int(first), int(last or first) + 1)]
    return found


@cache
def tables() -> dict[str, list[Row]]:
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        assert cells[0] == HEADER, title
        assert all(len(row) == len(HEADER) for row in cells), title
        found[title] = [Row(*row) for row in cells[2:]]
    return found


@cache
def names_in(path: str) -> set[str]:
    """The names of the test functions in a file, without importing it."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def cited(text: str) -> list[tuple[str, str]]:
    """(file, test) of every test named in a text."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


def test_a_cell_of_numbers_is_read() -> None:
    assert numbers("theorem 2.1, (5), (14)–(16)") == ["theorem 2.1", "(5)", "(14)", "(15)", "(16)"]
    assert numbers("lemma E.1") == ["lemma E.1"]
    assert numbers("b(t)") == numbers("section 2.3") == []


def test_there_is_a_section_for_every_paper() -> None:
    assert list(tables()) == list(NUMBERS)


@SECTIONS
def test_every_number_has_its_row(paper: str) -> None:
    found = [number for row in tables()[paper] for number in numbers(row.number)]
    assert len(found) == len(set(found)), "a number has two rows"
    assert set(found) == set(numbers(NUMBERS[paper]))


@SECTIONS
def test_every_row_says_where_it_is_tested_or_why_it_is_not(paper: str) -> None:
    for row in tables()[paper]:
        assert row.says, row
        assert row.where == "–" or re.search(r"`(rankwise\.|tests/)", row.where), row
        assert row.test == "–" or cited(row.test), row
        assert row.note or "–" not in (row.where, row.test), f"no test or no code, and no reason: {row}"


def test_every_name_of_the_library_exists() -> None:
    names = sorted(set(re.findall(r"`(rankwise\.[\w.]+)`", PAGE)))
    assert len(names) > 40
    for name in names:
        assert pkgutil.resolve_name(name) is not None


def test_every_test_and_every_file_exists() -> None:
    for path in set(re.findall(r"`(tests/[\w/]+\.py)(?:::\w+)?`", PAGE)):
        assert (ROOT / path).is_file(), path
    for path, name in cited(PAGE):
        assert name in names_in(path), f"{path}::{name}"
    assert PAGE.count("::") == len(cited(PAGE)), "a reference to a test is not of the form `tests/….py::test_…`"


def test_every_counterexample_is_named_with_what_is_wrong() -> None:
    path = "tests/test_counterexamples.py"
    assert names_in(path) == {name for file, name in cited(PAGE) if file == path}
    for row in [row for rows in tables().values() for row in rows]:
        if "**Wrong as printed:**" in row.note:
            assert any(file == path for file, _ in cited(row.test)), row
