"""Engines: what they refuse before any training, and that runs on Ray come to the same as runs in this process."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.compare.engines import Watch, engine_for, on_ray
from rankwise.compare.engines.on_ray import OnRay
from rankwise.compare.failures import FailedRunsError
from rankwise.compare.lock import LOCK
from rankwise.compare.plan import Plan, Run, make_plan
from rankwise.compare.provenance import library_versions
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import read_spec
from rankwise.errors import ArgumentError, RankwiseError

pytest_plugins = ["tiny_comparison"]

WriteSpec = Callable[..., Path]
COMMAND = "rankwise compare spec.toml"
OF_THE_OCCASION = ("seconds", "seconds_per_step", "created", "machine")
"""What a result says of its own time and place."""


# --- options ---------------------------------------------------------------------------------------------------------


def test_without_options_this_process_does_it() -> None:
    assert engine_for() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, r"^`--workers` must be at least 1; found 0$"),
        ({"workers": 2, "cpus_per_run": 0}, r"^`--cpus-per-run` must be at least 1; found 0$"),
        ({"workers": 2, "gpus_per_run": -0.5}, r"^`--gpus-per-run` must be from 0 to 1 .*; found -0.5$"),
        ({"workers": 2, "gpus_per_run": 2}, r"^`--gpus-per-run` must be from 0 to 1 \(`rankwise train --processes`"),
        ({"cpus_per_run": 2}, r"^`--cpus-per-run` must come together with --workers or --on ray; found 2$"),
        ({"gpus_per_run": 1}, r"^`--gpus-per-run` must come together with --workers or --on ray; found 1$"),
        ({"on": "slurm"}, r"^`--on` must be ray, ray=HOST:PORT or, .*ray=auto; found 'slurm'$"),
        ({"on": "ray=head"}, r"^`--on` must be ray, ray=HOST:PORT or, .*ray=auto; found 'ray=head'$"),
        ({"on": "ray=:6379"}, r"^`--on` must be ray, ray=HOST:PORT"),
        ({"workers": 2, "on": "ray=auto"}, r"^`--workers` must be left out with --on ray=ADDRESS, .*; found 2$"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine_for(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2}, r"^`--workers` must come with Ray installed: rankwise's extra 'ray' brings it; found 2$"),
        ({"on": "ray"}, r"^`--on` must come with Ray installed: rankwise's extra 'ray' brings it; found 'ray'$"),
    ],
)
def test_without_ray(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.compare.engines.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=message):
        engine_for(**options)


# --- on Ray ----------------------------------------------------------------------------------------------------------


def result_files(plan: Plan) -> dict[str, Any]:
    """Each result as it was written, without what belongs to the occasion."""
    found = {}
    for file in sorted((plan.spec.output / "results").iterdir()):
        content = json.loads(file.read_text())
        for name in OF_THE_OCCASION:
            del content[name]
        found[file.name] = content
    return found


def other_files(plan: Plan) -> dict[str, Any]:
    """Adapters and exports, byte for byte, but for the order in which PEFT writes a set of modules."""
    found: dict[str, Any] = {}
    for folder in ("adapters", "exports"):
        for file in (plan.spec.output / folder).rglob("*"):
            name = str(file.relative_to(plan.spec.output))
            if file.name == "adapter_config.json":
                config = json.loads(file.read_text())
                found[name] = config | {"target_modules": sorted(config["target_modules"])}
            elif file.is_file():
                found[name] = file.read_bytes()
    return found


@pytest.fixture
def searched(write_spec: WriteSpec) -> Callable[[Path], Plan]:
    """A plan with two methods, two seeds and two rates, which writes under a folder."""

    def plan(folder: Path) -> Plan:
        rates = {"learning_rate": [1e-6, 2e-2]}
        return make_plan(read_spec(write_spec(folder, methods=["lora", "adalora"], seeds=[0, 1], training=rates)))

    return plan


def own_processes(name: str) -> list[int]:
    """The processes that Ray has named so, among those that this one has started, at any remove."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                named = (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode())
                if named and _is_below(int(folder.name)):
                    found.append(int(folder.name))
            except OSError:  # it has ended meanwhile
                continue
    return found


def _is_below(process: int) -> bool:
    while process > 1:
        if process == os.getpid():
            return True
        stat = Path(f"/proc/{process}/stat").read_text()
        process = int(stat.rpartition(")")[2].split()[1])
    return False


class Killer(Watch):
    """Kills the process of one run once, in the middle of its training."""

    def __init__(self, key: str, at: int) -> None:
        self.key = key
        self.at = at
        self.killed: int | None = None
        self.steps_after: list[int] = []

    def at_step(self, run: Run, step: int) -> None:
        if run.key != self.key:
            return
        if self.killed is not None:
            self.steps_after.append(step)
        elif step >= self.at:
            (self.killed,) = own_processes(self.key)
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_workers_give_the_same_files_as_this_process(searched: Callable[[Path], Plan], tmp_path: Path) -> None:
    here, there = searched(tmp_path / "here"), searched(tmp_path / "there")
    run_plan(here, COMMAND)
    run_plan(there, COMMAND, engine=OnRay(workers=2, cpus_per_run=1))
    assert len(result_files(here)) == 2 * (2 + 1)
    assert len(other_files(here)) >= 2 * 2 * (2 + 1)
    assert result_files(there) == result_files(here)
    assert other_files(there) == other_files(here)
    assert (there.spec.output / "table.md").exists()
    assert run_plan(there, COMMAND) == run_plan(there, COMMAND, engine=OnRay(workers=1))  # all is done


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_process_is_taken_up_again_with_the_same_result(write_spec: WriteSpec, tmp_path: Path) -> None:
    steps = 400  # long enough to be caught in the middle
    plans = {}
    for name in ("here", "there"):
        spec = write_spec(tmp_path / name, methods=["adalora"], seeds=[0, 1], training={"steps": steps})
        plans[name] = make_plan(read_spec(spec))
    run_plan(plans["here"], COMMAND)

    first, _ = plans["there"].runs
    killer = Killer(first.key, steps // 2)
    run_plan(plans["there"], COMMAND, killer, OnRay(workers=2, cpus_per_run=1))
    assert killer.killed is not None
    assert 0 in killer.steps_after, "it did not start a second time"
    assert min(step for step in killer.steps_after if step) >= steps // 5, "it went on from no checkpoint"
    assert result_files(plans["there"]) == result_files(plans["here"])
    assert other_files(plans["there"]) == other_files(plans["here"])
    assert list((plans["there"].spec.output / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_an_error_in_one_run_leaves_the_others(write_spec: WriteSpec, tmp_path: Path) -> None:
    plan = make_plan(read_spec(write_spec(tmp_path, seeds=[0, 1], training={"steps": 2})))
    bad, good = plan.runs
    in_the_way = plan.spec.output / "checkpoints" / bad.key
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    with pytest.raises(FailedRunsError, match=r"^1 run failed; .*seed 0, .*: FileExistsError: ") as raised:
        run_plan(plan, COMMAND, engine=OnRay(workers=2))
    (result,) = raised.value.results
    assert (result.seed, result.steps) == (1, 2)
    assert [file.stem for file in (plan.spec.output / "results").iterdir()] == [good.key]
    written = json.loads((plan.spec.output / "failed" / f"{bad.key}.json").read_text())
    assert "in train_run" in written["traceback"]


@pytest.mark.slow
def test_a_process_that_dies_again_and_again_is_a_failure(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "RETRIES", 1)
    plan = make_plan(read_spec(write_spec(tmp_path, training={"steps": 100_000})))
    (run,) = plan.runs
    killed = set[int]()

    class KillAll(Watch):
        def at_step(self, run: Run, step: int) -> None:
            for process in own_processes(run.key):
                killed.add(process)
                os.kill(process, signal.SIGKILL)

    with pytest.raises(FailedRunsError, match=r"WorkerCrashedError") as raised:
        run_plan(plan, COMMAND, KillAll(), OnRay(workers=1))
    assert len(killed) == 2
    assert [failure.key for failure in raised.value.failures] == [run.key]


def test_a_cluster_that_does_not_answer_is_given_up_soon(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something listens at the address, and it is no Ray cluster."""
    monkeypatch.setattr(on_ray, "ANSWER_SECONDS", 2.0)
    plan = make_plan(read_spec(write_spec(tmp_path)))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ArgumentError) as raised:
            run_plan(plan, COMMAND, engine=engine_for(on=f"ray={address}"))
    assert time.monotonic() - began < 10
    assert str(raised.value) == (
        "`--on` must name a Ray cluster that answers within 2 s (one with tokens wants RAY_AUTH_MODE=token set); "
        f"found {address!r}"
    )


def test_a_share_of_a_gpu_that_no_machine_has(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan = make_plan(read_spec(write_spec(tmp_path)))
    message = r"^`--gpus-per-run` must be at most the GPUs of one machine, 0; found 0.5$"
    with pytest.raises(ArgumentError, match=message):
        run_plan(plan, COMMAND, engine=OnRay(workers=2, gpus_per_run=0.5))
    cores = os.cpu_count() or 1
    with pytest.raises(ArgumentError, match=rf"^`--cpus-per-run` must be at most the machine's cores, {cores}; found"):
        run_plan(plan, COMMAND, engine=OnRay(workers=2, cpus_per_run=cores + 1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cluster_of_two_machines(write_spec: WriteSpec, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    plan = make_plan(read_spec(write_spec(tmp_path, seeds=[0, 1], training={"steps": 2})))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        with pytest.raises(
            ArgumentError, match=r"^`--cpus-per-run` must be at most the cores of one machine, 1; found 2"
        ):
            run_plan(plan, COMMAND, engine=engine_for(on=f"ray={cluster.address}", cpus_per_run=2))
        assert len(run_plan(plan, COMMAND, engine=engine_for(on=f"ray={cluster.address}"))) == 2
    finally:
        cluster.shutdown()


def test_a_machine_that_does_not_share_the_folder_or_the_versions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"is not the folder of the command: all machines must share it$"):
        on_ray._check_machine(tmp_path, {})
    (tmp_path / LOCK).touch()
    with pytest.raises(RankwiseError, match=r"^this machine has torch .*, and the one of the command 1.0$"):
        on_ray._check_machine(tmp_path, {"torch": "1.0"})
    on_ray._check_machine(tmp_path, library_versions())
