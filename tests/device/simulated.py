"""The simulated device `sim`: built from `sim.cpp` when first asked for, registered with torch, its counters read.

from simulated import counted, register

register()
model.to("sim")
with counted() as counts:
    model(batch.to("sim"))
print(counts.launches, counts.reads, counts.copies)
"""

from __future__ import annotations

import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "sim"
ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / ".cache" / "simulated-device"
"""Where the compiled device is kept; torch compiles it again when its source or torch itself has changed."""


def missing() -> str | None:
    """Why the device cannot be built here, in one sentence; None where it can."""
    if shutil.which("ninja") is None:
        return "the simulated device needs ninja to be compiled: install it with `pip install ninja` or the system's"
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "the simulated device needs a C++ compiler, and none is here: install g++ or clang++"
    return None


@cache
def register() -> Any:
    """The compiled device, known to torch as `sim` from now on. The first call ever takes one to three minutes."""
    from torch.utils.cpp_extension import load

    # Each version of torch has headers of its own.
    folder = BUILD / f"torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.utils.rename_privateuse1_backend(NAME)
    built = load(
        "simulated_device",
        [str(Path(__file__).with_name("sim.cpp"))],
        extra_cflags=["-O1", "-g0"],
        build_directory=str(folder),
    )
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return built


class Event:
    """`torch.sim.Event`: every operation has ended when it returns."""

    def record(self) -> None:
        """Nothing to note."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _device_module() -> ModuleType:
    """`torch.sim`, as `torch.cuda`: what torch asks of a device from Python."""
    module = ModuleType(f"torch.{NAME}")
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda device=0: nullcontext(),
        "synchronize": lambda device=None: None,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        # Random numbers come from the CPU's own generator.
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=0: torch.get_rng_state(),
        "set_rng_state": lambda state, device=0: torch.set_rng_state(state),
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    module.Event = Event  # type: ignore[attr-defined]
    return module


@dataclass
class Counts:
    """What a GPU would have paid for, by the name of the operation."""

    launched: Counter[str] = field(default_factory=Counter)
    """Operations that start a kernel; views and allocations do not."""
    read: Counter[str] = field(default_factory=Counter)
    """The host waited for the device: numbers and tensors read back, and shapes that the device alone knows."""
    copied: Counter[str] = field(default_factory=Counter)
    """Tensors copied from the host."""
    places: Counter[str] = field(default_factory=Counter)
    """Where in the package or its callers reads and copies came from, where that was asked for."""

    @property
    def launches(self) -> int:
        """Operations that start a kernel."""
        return self.launched.total()

    @property
    def reads(self) -> int:
        """Times that the host waited."""
        return self.read.total()

    @property
    def copies(self) -> int:
        """Copies from the host."""
        return self.copied.total()

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(one + another for one, another in pairs))

    def __sub__(self, earlier: Counts) -> Counts:
        pairs = zip(vars(self).values(), vars(earlier).values(), strict=True)
        return Counts(*(one - another for one, another in pairs))


def so_far() -> Counts:
    """What has happened on the device since the process began, without places."""
    device = register()
    return Counts(Counter(device.launched()), Counter(device.reads()), Counter(device.copies()))


@contextmanager
def counted(*, places: bool = False) -> Iterator[Counts]:
    """Counts what happens on the device within the block; complete when it ends.

    Args:
        places: also note which function of Python each read and copy came from.
    """
    counts = Counts()

    def note(kind: str, name: str) -> None:
        counts.places[f"{kind} ({name}) at {_place()}"] += 1

    before = so_far()
    register().listen(note if places else None)
    try:
        yield counts
    finally:
        register().listen(None)
        found = so_far() - before
        counts.launched, counts.read, counts.copied = found.launched, found.read, found.copied


def _place() -> str:
    """The innermost function of ours that is running, as file:function; else that of whoever called torch."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    outside_torch = [frame for frame in frames if "torch" not in Path(frame.filename).parts]
    ours = [frame for frame in outside_torch if "rankwise" in Path(frame.filename).parts]
    found = ours or outside_torch
    if not found:
        return "torch's own backward pass"
    return f"{Path(found[-1].filename).name}:{found[-1].name}"
