"""`rankwise spec`."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

WIDTH = 100
KINDS = "classification, regression, image_classification, causal_lm, seq2seq, multiple_choice"
"""The kinds of task, written out, since help must answer before the registry is imported."""
EXAMPLES = {"output": "runs/mine", "train": "train.jsonl", "test": "test.jsonl", "steps": 300}
"""What a starting SPEC gives for keys of every task that have no default; those of one task say it themselves."""


def spec(
    task: str = typer.Option("classification", "--task", help=f"One of {KINDS}."),
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
    lines += ["", *_comment("The methods to compare: a table for each, with what is set for it.")]
    lines += ["[[method]]", 'name = "lora"', "[[method]]", 'name = "adalora"']
    return "\n".join(lines) + "\n"


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
