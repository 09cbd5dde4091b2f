"""Every method as `torchrun` and `accelerate launch` start it on two processes: the run of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cases import CASES

SCRIPT = Path(__file__).with_name("launched.py")
ONE = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port=0"]
ACCELERATE += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCHERS = {"torchrun": TORCHRUN, "accelerate launch": ACCELERATE}


def launch(launcher: list[str], folder: Path, how: str) -> None:
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(SCRIPT), str(folder), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        ("torchrun", "bare"),
        pytest.param("accelerate launch", "trainer", marks=pytest.mark.slow),
        pytest.param("torchrun", "trainer", marks=pytest.mark.slow),
        pytest.param("accelerate launch", "accelerator", marks=pytest.mark.slow),
    ],
)
def test_every_method_ends_as_on_one_process(launcher: str, how: str, tmp_path: Path) -> None:
    """From different seeds, since the processes start from the first one's; on the same total batches."""
    launch(ONE, tmp_path / "one", how)
    launch(LAUNCHERS[launcher], tmp_path / "two", how)
    names = ("final-0", "final-0", "final-1") if how == "trainer" else ("1-0", "2-0", "2-1")
    for name in CASES:
        folders = [tmp_path / which / name for which in ("one", "two", "two")]
        alone, first, second = (load_file(f / f"{n}.safetensors") for f, n in zip(folders, names, strict=True))
        for key, value in alone.items():
            assert torch.equal(first[key], second[key]), (name, key)
            torch.testing.assert_close(
                first[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, at=(name, key): f"{at}: {m}"
            )
