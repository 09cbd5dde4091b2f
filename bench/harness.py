"""What the benchmarks share: the machine they ran on, ways that take turns, ratios with their spread, result files."""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import peft
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

RESAMPLES = 2000
"""Of the bootstrap."""


class Ratio(NamedTuple):
    """A median of ratios, and where those of 95 % of its bootstrap resamples lie."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def options(doc: str | None, *, repeats: int, threads: int = 2) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds in which all take turns ({repeats})")
    parser.add_argument("--threads", type=int, default=threads, help=f"of torch ({threads})")
    return parser


def in_turns(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way in every round; the order is drawn anew for each, and the first round is not counted."""
    order, draw = list(ways), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(repeats + 1):
        draw.shuffle(order)
        for name in order:
            seconds = seconds_of(ways[name])
            if i:
                times[name].append(seconds)
    return times


def seconds_of(way: Callable[[], Any]) -> float:
    """Seconds that a call takes; on a GPU between CUDA events."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        way()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    way()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def kernels_of(step: Callable[[], Any]) -> int | None:
    """Kernels that a call launches on the GPU, if there is one."""
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if "Mem" not in event.key)


def peak_of(step: Callable[[], Any]) -> int:
    """The most bytes that a call allocates at a time, beyond what is there before it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def beside(reference: str, ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each way in every round, each with those of the reference, which runs again before every third way.

    Where a machine's speed drifts within a round, this is what can still be compared.
    """
    order, draw = [name for name in ways if name != reference], random.Random(0)
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for i in range(repeats + 1):
        draw.shuffle(order)
        for at in range(0, max(1, len(order)), 3):
            standard = seconds_of(ways[reference])
            for name in [reference, *order[at : at + 3]]:
                seconds = standard if name == reference else seconds_of(ways[name])
                if i:
                    pairs[name].append((seconds, standard))
    return pairs


def ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """The median of seconds / the reference's seconds."""
    quotients, draw = [seconds / standard for seconds, standard in pairs], random.Random(0)
    found = sorted(statistics.median(draw.choices(quotients, k=len(quotients))) for _ in range(RESAMPLES))
    low, high = found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]
    return Ratio(statistics.median(quotients), low, high)


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    cpus = Path("/proc/cpuinfo")
    models = [line for line in cpus.read_text().splitlines() if "model name" in line] if cpus.exists() else []
    found = {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    libraries = (torch, transformers, peft, accelerate)
    return found | {library.__name__: library.__version__ for library in libraries}


def revision() -> str:
    """Of this tree, if it is one of git's."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write(file: Path | None, results: Mapping[str, Any]) -> None:
    """The results with the machine and the revision they are from, as JSON."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine(), "revision": revision(), **results}, indent=1, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")
