"""An adapter of a large model's shape is looked at within bounds of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "seconds", "gigabytes"), [("7b", 60, 4), ("minilm", 10, 2)])
def test_an_inspection_keeps_its_bounds(shape: str, seconds: float, gigabytes: float, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "bench" / "inspecting.py"), "--shape", shape, "--json", str(file)]
    subprocess.run(command, check=True)
    found = json.loads(file.read_text())
    assert found["seconds"] < seconds
    assert found["gigabytes"] < gigabytes
