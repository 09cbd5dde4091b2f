"""docs/equations.md stays true: its names and tests exist, its tests run what they stand for, no number is left out.

Whether a row's tests run the functions that the row names is not asked here but while those tests run anyway, in every
session, by the hooks of `equations.py`: to run them a second time would take minutes. Such a row makes the session
fail at its end. Here it is tested that it does.
"""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from equations import PAGE, Row, cited, code_of, everyday_tests, in_file, rows, tables, unmet, watching
from rankwise.linalg.prox import soft_threshold
from rankwise.methods.sora import Sora
from rankwise.update import Factors

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")

NUMBERS = {
    "NNM-LoRA": "(1)–(11), figure 1, figure 2 (left), figure 2 (right), table 1, table 2, table 3",
    "NB-LoRA": ", ".join(f"claim {n}" for n in range(1, 10)),
    "SoRA": "(5)–(12), scheduler",
    "ALoRA": "(6), algorithm 1, figure 3",
    "AdaLoRA": "(1), (3)–(11), algorithm 1, figure 3",
    "SaLoRA": "(4)–(12), algorithm 1, figure 3, figure 7",
    "SORSA": "(1)–(39), theorem 1, theorem 2, theorem 3, lemma 4, theorem 5, listing 1, listing 2, "
    "figure 1, figure 2, figure 3, figure 4, table 1, table 2, table 3",
    "Deep LoRA": "(1)–(21), theorem 2.1, proposition 2.2, lemma E.1, lemma E.2, figure 1, figure 2 (left), "
    "figure 2 (right), figure 3 (left), figure 3 (middle), figure 3 (right), figure 4 (left), figure 4 (right), "
    "figure 5, figure 6, figure 7, figure 8, figure 9, figure 10 (left), figure 10 (right), table 1, table 2, table 3",
}
"""Every number in the papers' texts, by section of the page: read from the papers, not from the page. SoRA's scheduler
has no number there, and its row is as much needed."""

NAMED = r"theorem|lemma|proposition|algorithm|listing|claim|figure|table"
ONE_NUMBER = rf"\((\d+)\)(?:–\((\d+)\))?|((?:{NAMED}) [\w.]+(?: \((?:left|middle|right)\))?|scheduler)"
SECTIONS = pytest.mark.parametrize("paper", NUMBERS)


def numbers(cell: str) -> list[str]:
    """The numbers a cell names, ranges written out; an unnumbered row has none."""
    found: list[str] = []
    for part in cell.split(", "):
        match = re.fullmatch(ONE_NUMBER, part)
        if match:
            first, last, named = match.groups()
            found += [named] if named else [f"({n})" for n in range(int(first), int(last or first) + 1)]
    return found


def test_a_cell_of_numbers_is_read() -> None:
    assert numbers("theorem 2.1, (5), (14)–(16)") == ["theorem 2.1", "(5)", "(14)", "(15)", "(16)"]
    assert numbers("lemma E.1") == ["lemma E.1"]
    assert numbers("figure 2 (left), table 3") == ["figure 2 (left)", "table 3"]
    assert numbers("b(t)") == numbers("section 2.3") == []


def test_there_is_a_section_for_every_paper() -> None:
    assert list(tables(ROOT)) == list(NUMBERS)


@SECTIONS
def test_every_number_has_its_row(paper: str) -> None:
    found = [number for row in tables(ROOT)[paper] for number in numbers(row.number)]
    assert len(found) == len(set(found)), "a number has two rows"
    assert set(found) == set(numbers(NUMBERS[paper]))


@SECTIONS
def test_every_row_says_where_it_is_tested_or_why_it_is_not(paper: str) -> None:
    for row in tables(ROOT)[paper]:
        assert row.says, row
        assert row.where == "–" or re.search(r"`(rankwise\.|tests/)", row.where), row
        assert row.test == "–" or cited(row.test), row
        assert row.note or "–" not in (row.where, row.test), f"no test or no code, and no reason: {row}"


def test_every_name_of_the_library_exists() -> None:
    names = sorted(set(re.findall(r"`(rankwise\.[\w.]+)`", TEXT)))
    assert len(names) > 40
    for name in names:
        assert pkgutil.resolve_name(name) is not None


def test_every_test_and_every_file_exists() -> None:
    for path in set(re.findall(r"`(tests/[\w/]+\.py)(?:::\w+)?`", TEXT)):
        assert (ROOT / path).is_file(), path
    for path, name in cited(TEXT):
        assert name in in_file(ROOT / path), f"{path}::{name}"
    assert TEXT.count("::") == len(cited(TEXT)), "a reference to a test is not of the form `tests/….py::test_…`"


def test_every_counterexample_is_named_with_what_is_wrong() -> None:
    path = "tests/test_counterexamples.py"
    assert in_file(ROOT / path).keys() == {name for file, name in cited(TEXT) if file == path}
    for row in rows(ROOT):
        if "**Wrong as printed:**" in row.note:
            assert any(file == path for file, _ in cited(row.test)), row


# --- the tests that a row names run what it names -------------------------------------------------------------------


def test_every_row_with_a_function_and_a_test_can_be_judged() -> None:
    """By tests of the everyday suite; by code to look out for; where a test file is the place, by a test in it."""
    for row in rows(ROOT):
        files = re.findall(r"`(tests/[\w/]+\.py)`", row.where)
        tests = everyday_tests(row, ROOT)
        assert tests or row.test == "–", f"only slow tests: {row}"
        assert all(code_of(name) for name in row.functions), row
        assert all(any(test.startswith(f"{file}::") for test in tests) for file in files), row


def test_a_class_is_nothing_to_look_out_for() -> None:
    """Whatever makes an object of a method runs code of its class, and has computed nothing yet."""
    assert code_of("rankwise.methods.sora.Sora") == set()
    assert len(code_of("rankwise.methods.sora.Sora.kept")) == 1


def test_what_begins_to_run_is_seen() -> None:
    names = ["rankwise.linalg.prox.soft_threshold", "rankwise.methods.sora.Sora.kept", "rankwise.update.Factors.r"]
    function, method, prop = names

    def seen_in(action: Callable[[], object], *functions: str) -> set[str]:
        seen: set[str] = set()
        before = sys.getprofile()
        with watching(functions, seen):
            action()
        assert sys.getprofile() is before
        return seen

    x = torch.ones(2)
    assert seen_in(lambda: soft_threshold(x, 0.5), *names) == {function}
    assert seen_in(lambda: Sora().kept({"g": x}), *names) == {method}
    assert seen_in(lambda: Factors(x[None], x, x[None]).r, *names) == {prop}
    assert seen_in(lambda: [Sora().kept({"g": x}), soft_threshold(x, 0.5)], function) == {function}
    assert seen_in(lambda: soft_threshold(x, 0.5)) == set()


def test_a_row_is_judged_once_all_its_tests_have_run() -> None:
    one, other = (
        "tests/linalg/test_prox.py::test_equals_softshrink",
        "tests/test_equations.py::test_there_is_a_section_for_every_paper",
    )
    row = Row("(1)", "says", "`rankwise.a`, `rankwise.b`", f"`{one}`, `{other}`", "")
    assert unmet([row], ROOT, {one: {"rankwise.a"}, other: {"rankwise.b"}}) == []
    assert unmet([row], ROOT, {one: {"rankwise.a"}}) == []
    (sentence,) = unmet([row], ROOT, {one: {"rankwise.a"}, other: set()})
    assert sentence == f"(1) names rankwise.b, and none of {one}, {other} runs it"


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "workers"])
def test_a_session_fails_when_a_row_names_what_its_tests_do_not_run(workers: list[str], tmp_path: Path) -> None:
    """On a page of two rows, one of them true, in a session of its own with a library of two functions."""
    for folder in ("docs", "tests", "rankwise"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "rankwise/__init__.py").write_text("def called(): return 3\ndef imported(): return 4\n")
    tests = "from rankwise import called, imported\ndef test_a(): assert called() == 3\ndef test_b(): assert imported\n"
    (tmp_path / "tests/test_ab.py").write_text(tests)
    row = "| (1) | says | `rankwise.{}` | `tests/test_ab.py::test_{}` | |\n"
    head = "## Paper\n\n| number | what it says | where | test | note |\n| --- | --- | --- | --- | --- |\n"
    plugins = ["-p", "equations", *(["-p", "xdist", *workers] if workers else [])]
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def outcome(page: str) -> tuple[int, str]:
        (tmp_path / PAGE).write_text(head + page)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugins, "tests"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    code, said = outcome(row.format("called", "a"))
    assert (code, "2 passed" in said) == (0, True)
    code, said = outcome(row.format("called", "a") + row.format("imported", "b"))
    assert (code, "2 passed" in said) == (1, True)
    assert "(1) names rankwise.imported, and none of tests/test_ab.py::test_b runs it" in said
    assert "rankwise.called" not in said
