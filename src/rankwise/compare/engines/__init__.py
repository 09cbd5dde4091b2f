"""Engines, which carry out the runs of a comparison: in this process, or on Ray. Nothing heavy is imported here."""

from __future__ import annotations

import importlib.util

from rankwise.compare.engines.base import Ended, Engine, Watch
from rankwise.errors import ArgumentError

__all__ = ["Ended", "Engine", "Watch", "engine_for"]

RAY = "ray"


def engine_for(
    workers: int | None = None,
    on: str | None = None,
    cpus_per_run: int | None = None,
    gpus_per_run: float | None = None,
) -> Engine | None:
    """The engine that the options of a command ask for; None stands for the default, this process.

    Args:
        workers: how many runs at a time on this machine.
        on: `ray`, or `ray=ADDRESS` with the address of a cluster.
        cpus_per_run: CPU cores of each run, which are its threads.
        gpus_per_run: the share of a GPU that each run takes.

    Raises:
        ArgumentError: a value breaks its rule, two options do not go together, or Ray is not installed.
    """
    if workers is not None and workers < 1:
        raise ArgumentError("--workers", "be at least 1", workers)
    if cpus_per_run is not None and cpus_per_run < 1:
        raise ArgumentError("--cpus-per-run", "be at least 1", cpus_per_run)
    # Several GPUs in one process would make the Trainer multiply the batch by their number.
    if gpus_per_run is not None and not 0 <= gpus_per_run <= 1:
        rule = "be from 0 to 1 (`rankwise train --processes` trains one run on several GPUs)"
        raise ArgumentError("--gpus-per-run", rule, gpus_per_run)

    if workers is None and on is None:
        for name, value in (("--cpus-per-run", cpus_per_run), ("--gpus-per-run", gpus_per_run)):
            if value is not None:
                raise ArgumentError(name, "come together with --workers or --on ray", value)
        return None

    address = None if on is None else _address(on)
    if workers is not None and address is not None:
        rule = "be left out with --on ray=ADDRESS, where the cluster's CPUs and GPUs say how many run at a time"
        raise ArgumentError("--workers", rule, workers)
    if importlib.util.find_spec(RAY) is None:
        name, value = ("--workers", workers) if on is None else ("--on", on)
        raise ArgumentError(name, "come with Ray installed: rankwise's extra 'ray' brings it", value)

    from rankwise.compare.engines.on_ray import OnRay

    return OnRay(address, workers, cpus_per_run, gpus_per_run)


def _address(on: str) -> str | None:
    """The address of a cluster in the value of --on; None for a cluster of its own on this machine."""
    if on == RAY:
        return None
    name, _, address = on.partition("=")
    host, _, port = address.rpartition(":")
    known = address == "auto" or (host and port.isdigit())
    if name != RAY or not known:
        raise ArgumentError("--on", "be ray, ray=HOST:PORT or, on a machine of the cluster, ray=auto", on)
    return address
