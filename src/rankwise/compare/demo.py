"""The embedded default: a real encoder and an intent data set, both from installed packages."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rankwise.compare.spec import CEILING, Spec, read_spec

FEW = ("lora", "adalora", CEILING)
"""What the demo trains unless it is asked for all methods: the baseline, one that moves ranks between modules, and the
ceiling. The floor is added to every comparison."""


def demo_spec(output: Path, *, every: bool = False) -> Spec:
    """The SPEC of `rankwise demo`, writing to `output`; with all nine methods, or with FEW."""
    spec = read_spec(Path(str(files("rankwise"))) / "data" / "demo.toml")
    methods = tuple(entry for entry in spec.entries if every or entry.name in FEW)
    return spec.with_entries(methods).with_output(output)
