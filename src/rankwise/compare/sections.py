"""What the sections of a SPEC are made of: pydantic models whose errors are one sentence each.

A section is a table of the TOML file. Pydantic checks its keys and gives the JSON schema that editors complete from;
`told` turns pydantic's first complaint into the sentence that the rest of the package would raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from rankwise.errors import ArgumentError, nearest


class Section(BaseModel):
    """A table of the SPEC: unknown keys are refused, values are never converted, and what is read never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def has_unknown_key(section: type[BaseModel], table: dict[str, Any]) -> bool:
    """Whether a table has a key that its section does not know: the first thing to tell, since it is often a slip.

    A validator that runs before the keys are checked keeps quiet then.
    """
    return not table.keys() <= section.model_fields.keys()


def broken_rule(words: str, *, key: str | None = None, seen: Any = None) -> NoReturn:
    """Complain, from inside a validator, that a key breaks its rule.

    Args:
        words: the rule, completing the sentence "`key` must …".
        key: a key below the place of the validator; None for the place itself.
        seen: the value that was found, where it is not the one that the validator was given.
    """
    # The words are passed as context, since pydantic would take braces in a message for places to fill in.
    raise PydanticCustomError("rule", "{words}", {"words": words, "key": key, "seen": seen})


def rule(words: str) -> WrapValidator:
    """Whatever is wrong with a value, say so in these words."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except (ValidationError, OverflowError):
            return broken_rule(words)

    return WrapValidator(check)


def as_tuple(value: Any) -> Any:
    """TOML's lists as tuples, which cannot change."""
    return tuple(value) if isinstance(value, list) else value


def distinct(values: Any) -> Any:
    """Values that differ from each other.

    Raises:
        ValueError: one comes twice.
    """
    if isinstance(values, tuple) and len(set(values)) < len(values):
        raise ValueError(values)
    return values


def known_names(literal: Any, what: str) -> BeforeValidator:
    """A list of names that a `Literal` holds; another name is refused with the nearest ones.

    Args:
        literal: the `Literal` of the known names.
        what: what the names stand for, completing the sentence "`key` must name …".
    """
    known = get_args(literal)

    def check(value: Any) -> Any:
        for name in value if isinstance(value, list) else ():
            if isinstance(name, str) and name not in known:
                broken_rule(f"name {what} ({nearest(name, known)})", seen=name)
        return value

    return BeforeValidator(check)


def as_written(path: Path, info: SerializationInfo) -> str:
    """A path as a SPEC would write it: from the SPEC's own folder, where the path lies below it."""
    folder = (info.context or {}).get("folder", Path())
    inside = folder.parts and path.is_relative_to(folder)
    return (path.relative_to(folder) if inside else path).as_posix()


def _beside(value: Any, info: ValidationInfo) -> Any:
    """A path as the SPEC writes it, taken from the SPEC's own folder."""
    folder = (info.context or {}).get("folder", Path())
    return folder / value if isinstance(value, str) and value.strip() else value


Text = Annotated[str, Field(pattern=r"\S"), rule("be a non-empty string")]
"""A string with something in it."""
Texts = Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(as_tuple)]
"""A list of strings, at least one; the key that has it says its own rule."""
Count = Annotated[int, Field(ge=1), rule("be an integer of at least 1")]
"""A whole number of things."""
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), rule("be a finite number above 0")]
"""A learning rate, or another number that must be above zero."""
File = Annotated[
    Path,
    BeforeValidator(_beside),
    rule("be a non-empty string"),
    PlainSerializer(as_written),
    WithJsonSchema({"type": "string"}),
]
"""A path; a relative one starts at the folder of the SPEC."""


def told(error: ValidationError, model: type[BaseModel]) -> ArgumentError:
    """The sentence for what pydantic found wrong when it read `model`.

    Unknown keys come first: a misspelt key is often also a missing one, and its own name says more.
    """
    complaints = sorted(error.errors(), key=lambda complaint: complaint["type"] != "extra_forbidden")
    complaint = complaints[0]
    place = complaint["loc"]
    context = complaint.get("ctx", {})
    if complaint["type"] == "extra_forbidden":
        *section, key = place
        known = _keys_of(model, section)
        return ArgumentError(dotted(place), f"be a known key ({nearest(str(key), known)})", complaint["input"])
    if complaint["type"] == "missing":
        *section, _ = place
        where = f"[{dotted(section)}]" if section else "the SPEC"
        return ArgumentError(dotted(place), f"be among the keys of {where}", sorted(complaint["input"]))
    if complaint["type"] == "rule":
        key = context["key"]
        seen = complaint["input"] if context["seen"] is None else context["seen"]
        return ArgumentError(dotted(place if key is None else (*place, key)), context["words"], seen)
    if complaint["type"] == "model_type":
        return ArgumentError(dotted(place) or "spec", "be a table", complaint["input"])
    message = complaint["msg"]
    return ArgumentError(dotted(place), message[:1].lower() + message[1:], complaint["input"])


def _keys_of(model: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    """The keys of the section at `place`."""
    section: Any = model
    for name in place:
        section = section.model_fields[name].annotation
    return list(section.model_fields)


def dotted(place: Sequence[str | int]) -> str:
    """Where a value is, as `section.key` or `method[1].name`."""
    told = ""
    for part in place:
        if isinstance(part, int):
            told += f"[{part}]"
        else:
            told += f".{part}" if told else part
    return told
