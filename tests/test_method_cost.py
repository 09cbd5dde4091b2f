"""A method costs three files and one class line: nothing else in the package, and no table in the tests, names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rankwise.adapters.configs import CONFIGS
from rankwise.methods import METHODS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "rankwise"
FILES = sorted(file for file in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("name", list(METHODS))
def test_only_its_own_file_and_the_class_lines_name_a_method(name: str) -> None:
    method, config = METHODS[name].__name__, CONFIGS[name].__name__
    module = METHODS[name].__module__.rpartition(".")[2]
    code = re.compile(rf"(?<!peft\.)\b({method}|{config}|methods\.{module})\b|methods import [^\n]*\b{module}\b")
    naming = {
        str(file.relative_to(SOURCE))
        for file in FILES
        if any(code.search(line) for line in _code_of(file.read_text()).splitlines())
    }
    assert naming == {f"methods/{module}.py", "adapters/configs.py"}


@pytest.mark.parametrize("name", list(METHODS))
def test_the_class_line_is_all_there_is_in_the_configs(name: str) -> None:
    config, module = CONFIGS[name].__name__, METHODS[name].__module__.rpartition(".")[2]
    text = _code_of((SOURCE / "adapters" / "configs.py").read_text())
    lines = [line for line in text.splitlines() if re.search(rf"\b({config}|{module})\b", line)]
    assert [line for line in lines if "import" not in line] == [
        f"class {config}(AdapterConfig, {module}.{METHODS[name].__name__}):"
    ]


@pytest.mark.parametrize("name", list(METHODS))
def test_it_has_a_card_with_the_headings(name: str) -> None:
    card = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    headings = re.findall(r"^\*\*(.+?)\.\*\*", card, re.MULTILINE)
    assert headings == [
        "Idea",
        "When to use it",
        "When not",
        "Knobs and defaults",
        "Learning rate",
        "Cost",
        "Measured",
        "Differs from the authors' code",
        "Reference",
    ]
    assert "TODO" not in card
    suggested = f"{METHODS[name].suggested_rate:.0e}".replace("e-0", "e-")
    assert suggested in card, "the card states the suggested learning rate"


def _code_of(text: str) -> str:
    """The text without docstrings and comments, which may name any method."""
    return re.sub(r"#.*", "", re.sub(r'""".*?"""', '""', text, flags=re.DOTALL))
