"""Reads docs/equations.md, and records which functions the tests that it names run.

A row of that page names functions and tests. That a test exists says little: it may build the same thing anew and
never call the function it stands for. So the tests are watched while they run anyway. The hooks at the end of this
file, which `conftest.py` takes over, give Python a profile function during every test that the page names; it notes
which of its rows' functions begin to run, and is taken off once all of them have. When the session ends, a row one of
whose functions none of its tests has run makes it fail. Under xdist each worker sends what it saw to the controller.

Why not run the named tests a second time: that would take minutes, and the everyday suite shall not grow by them.
Watching costs next to nothing, since most tests call the function at once.

A row is judged when all its tests ran and passed, so that a file can be run on its own; where single cases of a test
were picked (`-k`, `--lf`, brackets) nothing is judged. Tests marked slow do not count: what the page says must be shown
by the everyday suite. `tests/test_equations.py` checks the rest.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest

PAGE = Path("docs", "equations.md")
HEADER = ["number", "what it says", "where", "test", "note"]


class Row(NamedTuple):
    """A row of the page, its cells as they are written."""

    number: str
    says: str
    where: str
    test: str
    note: str

    @property
    def functions(self) -> list[str]:
        """The functions of the library that compute it."""
        return re.findall(r"`(rankwise\.[\w.]+)`", self.where)


@cache
def tables(root: Path) -> dict[str, list[Row]]:
    """The rows of every section."""
    page = (root / PAGE).read_text(encoding="utf-8")
    found = {}
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        assert cells[0] == HEADER, title
        assert all(len(row) == len(HEADER) for row in cells), title
        found[title] = [Row(*row) for row in cells[2:]]
    return found


def rows(root: Path) -> list[Row]:
    """The rows of all sections."""
    return [row for section in tables(root).values() for row in section]


def cited(text: str) -> list[tuple[str, str]]:
    """(file, test) of every test named in a text."""
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


@cache
def in_file(file: Path) -> dict[str, bool]:
    """The test functions in a file, without importing it, and whether each is marked slow."""
    functions = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    marks = {node.name: [ast.unparse(mark) for mark in node.decorator_list] for node in functions}
    return {name: "pytest.mark.slow" in of for name, of in marks.items() if name.startswith("test_")}


def everyday_tests(row: Row, root: Path) -> list[str]:
    """The tests that a row names, as pytest's node ids, without those marked slow."""
    return [f"{file}::{name}" for file, name in cited(row.test) if not in_file(root / file)[name]]


def code_of(name: str) -> set[CodeType]:
    """The code of a function, a method or a property; none of a class, which any use of an object of it would run."""
    found = pkgutil.resolve_name(name)
    plain = found.fget if isinstance(found, property) else inspect.unwrap(found)
    return {plain.__code__} if inspect.isroutine(plain) and hasattr(plain, "__code__") else set()


@contextmanager
def watching(functions: Iterable[str], seen: set[str]) -> Generator[None]:
    """Add to `seen` each of the functions that begins to run meanwhile."""
    waiting: dict[CodeType, set[str]] = {}
    for name in functions:
        for code in code_of(name):
            waiting.setdefault(code, set()).add(name)
    other = sys.getprofile()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or frame.f_code not in waiting:
            return
        seen.update(waiting[frame.f_code])
        for code in [code for code, names in waiting.items() if names <= seen]:
            del waiting[code]
        if not waiting:
            sys.setprofile(other)  # every call is slower until then

    if waiting:
        sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(other)


def unmet(page: Sequence[Row], root: Path, seen: Mapping[str, set[str]]) -> list[str]:
    """A sentence for every function that no test of its row has run, though all of them ran.

    Args:
        page: rows to judge.
        root: of the project.
        seen: the functions that each test has run, by its node id; a test that did not run is missing.
    """
    sentences = []
    for row in page:
        tests = everyday_tests(row, root)
        if not tests or not seen.keys() >= set(tests):
            continue
        idle = set(row.functions).difference(*(seen[test] for test in tests))
        sentences += [f"{row.number} names {name}, and none of {', '.join(tests)} runs it" for name in sorted(idle)]
    return sentences


# --- hooks ----------------------------------------------------------------------------------------------------------

SEEN = pytest.StashKey[dict[str, set[str]]]()
SENTENCES = pytest.StashKey[list[str]]()
CARRIED = "functions of equations.md"
"""Under this name a worker of xdist hands on what it saw."""


@cache
def _wanted(root: Path) -> dict[str, set[str]]:
    """The functions of its rows, by the node id of every test that is named."""
    found: dict[str, set[str]] = {}
    for row in rows(root):
        for test in everyday_tests(row, root):
            found.setdefault(test, set()).update(row.functions)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Watch a test that the page names; one that fails leaves no record."""
    config, test = item.config, item.nodeid.partition("[")[0]
    wanted = _wanted(config.rootpath)
    if test not in wanted:
        return (yield)
    seen: set[str] = set()
    with watching(wanted[test], seen):
        result = yield
    config.stash.setdefault(SEEN, {}).setdefault(test, set()).update(seen)
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """In xdist's controller: take in what a worker saw."""
    for test, seen in getattr(node, "workeroutput", {}).get(CARRIED, {}).items():
        node.config.stash.setdefault(SEEN, {}).setdefault(test, set()).update(seen)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Judge the rows, or in a worker hand on what was seen."""
    config = session.config
    seen = config.stash.get(SEEN, {})
    if hasattr(config, "workeroutput"):
        config.workeroutput[CARRIED] = {test: sorted(names) for test, names in seen.items()}  # type: ignore[attr-defined]
        return
    option = config.option
    some_cases_only = option.keyword or getattr(option, "lf", False) or any("[" in argument for argument in config.args)
    config.stash[SENTENCES] = [] if some_cases_only else unmet(rows(config.rootpath), config.rootpath, seen)
    if config.stash[SENTENCES] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which rows fail."""
    sentences = config.stash.get(SENTENCES, [])
    if sentences:
        terminalreporter.section(f"FAILED {PAGE}: a row's tests must run the functions that it names", red=True)
        for sentence in sentences:
            terminalreporter.line(sentence)
