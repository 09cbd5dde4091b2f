"""`rankwise spec`."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

WIDTH = 100
SCHEMA = Path(__file__).parent.parent / "data" / "spec.schema.json"
"""The schema that ships with the package. Help takes the kinds of task from it, since it must answer before torch and
the registry of tasks are imported."""
EXAMPLES = {"output": "runs/mine", "train": "train.jsonl", "test": "test.jsonl", "steps": 300}
"""What a starting SPEC gives for keys of every task that have no default; those of one task say it themselves."""


def kinds_of_task() -> list[str]:
    """The kinds of task that a SPEC may name."""
    definitions = json.loads(SCHEMA.read_text(encoding="utf-8"))["$defs"].values()
    kinds = [
        each["properties"]["type"]["const"] for each in definitions if "const" in each["properties"].get("type", {})
    ]
    return list(dict.fromkeys(kinds))


def spec(
    task: str = typer.Option("classification", "--task", help=f"One of {', '.join(kinds_of_task())}."),
    schema: bool = typer.Option(False, "--schema", help="Print the JSON schema that editors complete SPEC files by."),
) -> None:
    """Print a commented SPEC to start from: every key, what it means and its default.

    Example: `rankwise spec --task causal_lm`
    """
    from rankwise.compare import spec as specs
    from rankwise.compare.tasks import TASKS
    from rankwise.errors import ArgumentError, nearest

    if schema:
        typer.echo(json.dumps(specs.schema(), indent=1))
        return
    if task not in TASKS:
        raise ArgumentError("--task", f"be a kind of task ({nearest(task, TASKS)})", task)
    typer.echo(starting_spec(task), nl=False)


def starting_spec(task: str) -> str:
    """A SPEC of one kind of task that lists every key; those with a default are commented out."""
    from rankwise.compare.spec import spec_class
    from rankwise.compare.tasks import TASKS

    kind = spec_class(task)
    sections = ("data", "task", "training", "budget")
    examples = EXAMPLES | {"model": TASKS[task].example_model}
    lines = [f"# A SPEC for {task}. Lines that begin with # and a key show its default.", ""]
    for name, field in kind.model_fields.items():
        if name not in (*sections, "methods", "method"):
            lines += _key(name, field, examples)
    for name in sections:
        section: Any = kind.model_fields[name].annotation
        lines += ["", f"[{name}]", *_section(section, examples)]
    lines += ["", *_methods()]
    return "\n".join(lines) + "\n"


def _methods() -> list[str]:
    """Two methods to compare, what else there is to choose from, and what can be set for each."""
    from rankwise.compare.candidates import NAMES
    from rankwise.compare.spec import Entry

    choice = f"Choose among {', '.join(NAMES)}, or any config class of PEFT, as peft.LoraConfig."
    lines = _comment("The methods to compare: a table for each, with its name and what is set for it. " + choice)
    lines += ["[[method]]", 'name = "lora"', "[[method]]", 'name = "adalora"']
    for name, field in Entry.model_fields.items():
        if name != "name":
            lines += _key(name, field, {})
    lines += _comment("And every field of the method itself (docs/methods has a page for each), as:")
    return [*lines, "# r = 16"]


def _section(section: type[BaseModel], examples: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, field in section.model_fields.items():
        lines += _key(name, field, examples)
    return lines


def _key(name: str, field: FieldInfo, examples: dict[str, Any]) -> list[str]:
    """What a key means, and the key: with an example where it must be given, else commented out with its default."""
    lines = _comment(field.description or "")
    if name == "type":
        return [*lines, f"type = {_toml(field.default)}"]
    if name in examples:
        return [*lines, f"{name} = {_toml(examples[name])}"]
    if field.examples:
        return [*lines, f"{name} = {_toml(field.examples[0])}"]
    if field.is_required():  # a column, which may well be called what it is
        return [*lines, f"{name} = {_toml(name)}"]
    if field.default is None:
        return [*lines, f"# {name} ="]
    return [*lines, f"# {name} = {_toml(field.default)}"]


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH)]


def _toml(value: Any) -> str:
    """A value as TOML writes it, which JSON does alike for what a SPEC holds."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
