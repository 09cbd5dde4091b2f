"""Another revision's code against this one's, in turns: `python bench/before.py f4c0ac1 step_time.py`.

A benchmark script of this folder runs as often as `--turns` says with either code in a process of its own, and what it
finds is set side by side: medians over the turns, and the median of the quotients of neighbouring turns, new / old.
Whatever follows the script's name goes to it: `python bench/before.py f4c0ac1 scaling.py --repeats 5`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import machine, write

HERE = Path(__file__).parent
VALUES = {"step_time.py": "median", "memory.py": "step", "scaling.py": "ms", "budget.py": "ms"}
"""What is compared of each script's rows."""
NAMES = ("model", "method", "way", "layers", "r", "kind")
"""What tells rows apart."""


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A revision's tree in a folder of its own, for as long as it is looked at."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", tree, revision], cwd=HERE, check=True, capture_output=True
        )
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=HERE, check=True)


def rows_of(script: str, arguments: list[str], source: Path) -> dict[tuple[Any, ...], float]:
    """What the script finds with the package at `source`."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, HERE / script, *arguments, "--json", found]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": str(source)}, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(found.read_text())["rows"]
    return {tuple(row[name] for name in NAMES if name in row): row[VALUES[script]] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="of git, with the code to compare with")
    parser.add_argument("script", choices=VALUES)
    parser.add_argument("--turns", type=int, default=1, help="of either code (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    given, arguments = parser.parse_known_args()
    turns: dict[str, list[dict[tuple[Any, ...], float]]] = {"old": [], "new": []}
    with checkout(given.revision) as tree:
        for _ in range(given.turns):
            for which, root in (("old", tree), ("new", HERE.parent)):
                turns[which].append(rows_of(given.script, arguments, root / "src"))
    rows = []
    for name in turns["new"][0]:
        old, new = ([turn[name] for turn in turns[which]] for which in ("old", "new"))
        quotients = [b / a for a, b in zip(old, new, strict=True) if a]
        quotient = statistics.median(quotients) if quotients else None
        rows.append({"row": name, "old": old, "new": new, "quotient": quotient})
        told = f"{statistics.median(old):.4g} → {statistics.median(new):.4g}"
        print(f"{' '.join(map(str, name)):<40}{told:>24}  {'–' if quotient is None else f'{quotient:.2f}'}")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    write(given.json, {"old": given.revision, "script": given.script, "arguments": arguments, "rows": rows})


if __name__ == "__main__":
    main()
