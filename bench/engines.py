"""One comparison in this process and on Ray with two workers, one of them killed: the same files but for times?

    python bench/engines.py SPEC --out FOLDER --json bench/results/engines.json

SPEC is one of `bench/specs`, prepared by `bench/language_models.py prepare`. `rankwise compare` runs it twice, into
FOLDER/here and FOLDER/ray. In the second, a run's process is killed by SIGKILL once it has written a checkpoint, after
some runs have ended. Then every result, adapter and export of the one is compared with that of the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import write

OF_THE_OCCASION = ("command", "created", "git", "machine", "peak_memory", "seconds", "seconds_per_step")
"""Fields of a result that say when, where, from which commit and how fast it was made."""
ENDED_BEFORE_THE_KILL = 8
"""So many runs have ended when a process is killed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where both write")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the outcome goes")
    options = parser.parse_args()
    here, ray = options.out / "here", options.out / "ray"
    subprocess.run(command(options.spec, here), check=True)
    killed = run_and_kill(command(options.spec, ray, "--workers", "2"), ray)
    table = (here / "table.md").read_text(encoding="utf-8")
    write(options.json, {"killed": killed, **differences(here, ray), "table": table.splitlines()})


def command(spec: Path, output: Path, *more: str) -> list[str]:
    return [str(Path(sys.executable).with_name("rankwise")), "compare", str(spec), "--out", str(output), *more]


def run_and_kill(line: list[str], output: Path) -> dict[str, Any]:
    """Run a command to its end, and kill one of its runs on the way; which one, at which checkpoint."""
    shutil.rmtree(output, ignore_errors=True)
    killed: dict[str, Any] = {}
    process = subprocess.Popen(line)
    while process.poll() is None:
        if not killed and len(list(output.glob("results/*.json"))) >= ENDED_BEFORE_THE_KILL:
            killed = kill_one(output)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{' '.join(line)} ended with {process.returncode}")
    if not killed:
        raise SystemExit("no run was caught with a checkpoint: give them more steps")
    return killed


def kill_one(output: Path) -> dict[str, Any]:
    """Kill the process of a run that has a checkpoint and no result; empty where there is none."""
    for state in output.glob("checkpoints/*/checkpoint-*/trainer_state.json"):
        key = state.parents[1].name
        for process in processes_of(key):
            os.kill(process, signal.SIGKILL)
            return {"run": key, "checkpoint": state.parent.name}
    return {}


def processes_of(key: str) -> list[int]:
    """Ray names a process by the run that it trains."""
    found = subprocess.run(["pgrep", "-f", f"^ray::{key}"], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def differences(here: Path, ray: Path) -> dict[str, Any]:
    """How many files there are, and which differ."""
    left, right = files_of(here), files_of(ray)
    differing = sorted(name for name in left.keys() & right.keys() if left[name] != right[name])
    return {
        "files": len(left),
        "only_in_one": sorted(left.keys() ^ right.keys()),
        "differing": differing,
        "ignored_fields": OF_THE_OCCASION,
    }


def files_of(output: Path) -> dict[str, Any]:
    """What each result, adapter and export holds, by its path; tensors byte for byte."""
    found: dict[str, Any] = {}
    for file in sorted(output.glob("results/*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        found[file.name] = {name: value for name, value in result.items() if name not in OF_THE_OCCASION}
    for folder in ("adapters", "exports"):
        for file in sorted((output / folder).rglob("*")):
            name = str(file.relative_to(output))
            if file.suffix == ".safetensors":
                found[name] = file.read_bytes()
            elif file.name == "adapter_config.json":
                config = json.loads(file.read_text(encoding="utf-8"))
                # PEFT writes a set of names, in any order.
                found[name] = config | {"target_modules": sorted(config.get("target_modules") or [])}
    return found


if __name__ == "__main__":
    main()
