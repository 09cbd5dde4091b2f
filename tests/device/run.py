"""Runs the tests of this folder; says in one sentence why, where the simulated device cannot be built.

python tests/device/run.py [--device cuda] [more arguments of pytest]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import simulated


def main(arguments: list[str]) -> int:
    """Run pytest with these arguments."""
    reason = None if "cuda" in arguments else simulated.missing()
    if reason:
        print(f"No test was run: {reason}.")
        return 0
    folder = Path(__file__).parent
    return subprocess.call([sys.executable, "-m", "pytest", str(folder), *arguments], cwd=folder.parents[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
