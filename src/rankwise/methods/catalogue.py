"""The methods as plain data: what `rankwise methods` prints and the documentation's tables are made from.

It is made without the config classes, whose base class is PEFT's and takes seconds to import.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rankwise.methods.base import METHODS


def catalogue() -> list[dict[str, Any]]:
    """For each method its name, config class, one-line summary, and its fields with default and help.

    Defaults are those of a config made without arguments, so a field that another one sets (init_r from r) shows the
    value it gets.
    """
    listed = []
    for name, method in METHODS.items():
        made = method()
        made.check()  # fills in the fields that others set
        listed.append(
            {
                "method": name,
                "config": method.config_name,
                "summary": method.summary,
                "fields": {
                    field.name: {"default": _plain(getattr(made, field.name)), "help": field.metadata["help"]}
                    for field in dataclasses.fields(method)
                },
            }
        )
    return listed


def _plain(value: Any) -> Any:
    """A default as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
