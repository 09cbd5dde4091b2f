"""The methods as plain data: what `rankwise methods` prints and the documentation's tables are made from."""

from __future__ import annotations

import dataclasses
from typing import Any

from rankwise.adapters.configs import CONFIGS
from rankwise.methods import METHODS


def catalogue() -> list[dict[str, Any]]:
    """For each method its name, config class, one-line summary, suggested learning rate, and fields with help.

    Defaults are those of a config made without arguments, so a field that another one sets (init_r from r) shows the
    value it gets.
    """
    listed = []
    for name, config in CONFIGS.items():
        made = config()
        listed.append(
            {
                "method": name,
                "config": config.__name__,
                "summary": METHODS[name].summary,
                "learning_rate": METHODS[name].suggested_rate,
                "fields": {
                    field.name: {"default": getattr(made, field.name), "help": field.metadata["help"]}
                    for field in dataclasses.fields(METHODS[name])
                },
            }
        )
    return listed
