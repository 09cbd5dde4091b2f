"""The embedded default: a real encoder and an intent data set, both from installed packages."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path

from rankwise.compare.spec import Spec, read_spec


def demo_spec(output: Path) -> Spec:
    """The SPEC of `rankwise demo`, writing to `output`."""
    spec = read_spec(Path(str(files("rankwise"))) / "data" / "demo.toml")
    return dataclasses.replace(spec, output=output.absolute())
