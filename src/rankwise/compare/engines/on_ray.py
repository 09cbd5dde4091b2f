"""Runs on Ray: several at a time, each in a process of its own, on this machine or on many.

Ray is imported inside functions, and so is torch: a command checks its options before it waits for either, and the
small actor that collects progress needs neither.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from rankwise.compare.engines.base import Ended, Engine, Watch
from rankwise.compare.failures import Failure
from rankwise.errors import ArgumentError, RankwiseError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rankwise.compare.plan import Plan, Run
    from rankwise.compare.results import Result

RETRIES = 3
"""How often a run is taken up again after its process died."""
ANSWER_SECONDS = 20.0
"""How long a cluster may take to answer; Ray itself would wait for minutes."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported about this use of Ray
    "RAY_task_oom_retries": str(RETRIES),  # Ray would start a run anew without end whose memory it ran out of
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a run without a GPU hides GPUs itself, and Ray need not warn
}
"""Settings of a cluster that is started here, where the environment does not say otherwise."""
POLL_SECONDS = 0.5
"""How often progress is asked for, and told by a run at most."""


class Board:
    """An actor that knows the latest step of every run."""

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def tell(self, key: str, step: int) -> None:
        """So many steps of a run are done."""
        self._steps[key] = step

    def read(self) -> dict[str, int]:
        """The latest step of every run that has started."""
        return self._steps


class OnRay(Engine):
    """Runs on Ray, each in a fresh process.

    Args:
        address: of a running cluster, `HOST:PORT` or `auto`; None starts one on this machine, and ends it.
        workers: how many runs at a time on this machine; None lets its cores and GPUs decide.
        cpus_per_run: cores, and so threads, of each run; by default an equal share of this machine's cores for each of
            `workers`, else 1.
        gpus_per_run: the share of a GPU for each run; by default a whole one where there are GPUs.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        cpus_per_run: int | None = None,
        gpus_per_run: float | None = None,
    ) -> None:
        self._address = address
        self._workers = workers
        self._cpus_per_run = cpus_per_run
        self._gpus_per_run = gpus_per_run
        self._under_way: dict[Any, Run] = {}

    def start(self, plan: Plan, command: str, watch: Watch) -> None:
        """Start a cluster here or connect to one, and give it the plan.

        Raises:
            ArgumentError: the cluster does not answer, or has not the CPUs or GPUs that each run shall have.
        """
        super().start(plan, command, watch)
        import ray

        from rankwise.compare.provenance import library_versions

        if self._address is None:
            self._start_cluster()
        else:
            self._connect(self._address)
        self._gpus = self._checked_resources()
        self._versions = library_versions(quantised=plan.spec.training.quantise is not None)
        board: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
        self._board: Any = board.remote()
        self._plan = ray.put(plan)
        # max_calls=1: a process serves one run and ends. max_retries counts deaths of the process alone: an error
        # raised in a run would be raised again.
        room = {"num_cpus": self._threads, "num_gpus": self._gpus}
        self._task: Any = ray.remote(**room, max_calls=1, max_retries=RETRIES)(_train)

    def _start_cluster(self) -> None:
        """A cluster of this machine alone, with the cores of so many runs as shall be under way at a time."""
        import ray

        cores = os.cpu_count() or 1
        if self._cpus_per_run is not None and self._cpus_per_run > cores:
            raise ArgumentError("--cpus-per-run", f"be at most the machine's cores, {cores}", self._cpus_per_run)
        shared_by = self._workers or cores
        self._threads = self._cpus_per_run or max(1, cores // shared_by)
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        logical_cpus = cores if self._workers is None else self._workers * self._threads
        ray.init(
            address="local",
            num_cpus=logical_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )

    def _connect(self, address: str) -> None:
        """Connect to a running cluster."""
        import ray

        self._threads = self._cpus_per_run or 1
        _check_answer(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)

    def _checked_resources(self) -> float:
        """The share of a GPU that each run takes, once machines are known to have what each run takes."""
        import ray

        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most_cpus = max(machine.get("CPU", 0) for machine in machines)
        if self._threads > most_cpus:
            raise ArgumentError("--cpus-per-run", f"be at most the cores of one machine, {most_cpus:g}", self._threads)
        most_gpus = max(machine.get("GPU", 0) for machine in machines)
        gpus = min(1, most_gpus) if self._gpus_per_run is None else self._gpus_per_run
        if gpus > most_gpus:
            raise ArgumentError("--gpus-per-run", f"be at most the GPUs of one machine, {most_gpus:g}", gpus)
        if self._workers is not None and gpus:
            # A run's share lies on one GPU: of shares above a half, one fits each GPU.
            places = int(most_gpus) * int(1 / gpus)
            if self._workers > places:
                rule = f"be at most {places}, since each run takes {gpus:g} of {most_gpus:g} GPUs (--gpus-per-run)"
                raise ArgumentError("--workers", rule, self._workers)
        return gpus

    def submit(self, run: Run) -> None:
        """Hand a run to Ray, which starts it once there is room."""
        # The key names the process, so that a run can be found among others.
        task = self._task.options(name=run.key)
        given = (self._plan, run, self.command, self._versions, self._threads, self._gpus, self._board)
        self._under_way[task.remote(*given)] = run

    def next_ended(self) -> Ended:
        """Wait for a run to end, and tell of the progress of all meanwhile."""
        import ray

        while True:
            ended, _ = ray.wait(list(self._under_way), num_returns=1, timeout=POLL_SECONDS)
            self._tell_progress(but=ended)
            if ended:
                run = self._under_way.pop(ended[0])
                return Ended(run, _outcome(ended[0], run))

    def _tell_progress(self, but: list[Any]) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            steps: Any = ray.get(self._board.read.remote(), timeout=ANSWER_SECONDS)
        except RayError:  # progress is for the eye alone, and the next look may succeed
            return
        for reference, run in self._under_way.items():
            if run.key in steps and reference not in but:
                self.watch.at_step(run, steps[run.key])

    def stop(self) -> None:
        """Disconnect, which ends this command's processes; a cluster that was started here ends with it."""
        import ray

        ray.shutdown()


def _check_answer(address: str) -> None:
    """Refuse a cluster that does not answer soon. A process of its own tries, since Ray cannot be told to give up."""
    program = f"import ray; ray.init(address={address!r}, log_to_driver=False, logging_level='ERROR')"
    rule = f"name a Ray cluster that answers within {ANSWER_SECONDS:g} s"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ArgumentError("--on", f"{rule} (one with tokens wants RAY_AUTH_MODE=token set)", address) from error
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ArgumentError("--on", f"{rule} ({reason})", address)


def _outcome(reference: Any, run: Run) -> Result | Failure:
    """What a run came to; an error of Ray's own says that its process died too often or never started."""
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(reference)
    except RayError as error:
        return Failure.of(run, error)


# --- in the process of a run -----------------------------------------------------------------------------------------


def _train(
    plan: Plan, run: Run, command: str, versions: dict[str, str], threads: int, gpus: float, board: Any
) -> Result | Failure:
    """Train a run in a process of its own; an error is what it came to."""
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        import torch

        from rankwise.compare.train import train_run

        torch.set_num_threads(threads)
        _check_machine(plan.spec.output, versions)
        tell = _teller(run.key, board)
        tell(0)
        return train_run(plan, run, plan.spec.output, command, tell)
    except Exception as error:
        return Failure.of(run, error)


def _check_machine(output: Path, versions: dict[str, str]) -> None:
    """Refuse a machine whose results would not be those of the plan, or would be written where nobody looks.

    Raises:
        RankwiseError: other versions of libraries, or another file system.
    """
    from rankwise.compare.lock import LOCK
    from rankwise.compare.provenance import QUANTISES, library_versions

    if not (output / LOCK).exists():
        raise RankwiseError(f"{output} is not the folder of the command: all machines must share it")
    here = library_versions(quantised=QUANTISES in versions)
    for name, version in versions.items():
        if here.get(name) != version:
            raise RankwiseError(f"this machine has {name} {here.get(name)}, and the one of the command {version}")


def _teller(key: str, board: Any) -> Callable[[int], None]:
    """Tells the board of a run's steps, now and then."""
    latest = 0.0

    def tell(step: int) -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest >= POLL_SECONDS:
            latest = now
            board.tell.remote(key, step)

    return tell
