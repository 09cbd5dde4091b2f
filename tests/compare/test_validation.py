"""The validation score on the way, and the best weights by it: the same bits as a run that stopped there."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rankwise.compare.engines import Watch
from rankwise.compare.models import open_for
from rankwise.compare.plan import Plan, Run, make_plan
from rankwise.compare.results import Result
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import read_spec
from rankwise.errors import ArgumentError
from tiny_comparison import WriteSpec

pytest_plugins = ["tiny_comparison"]

# A constant rate makes the first steps of a long run those of a short one; a high one makes the score go up and down.
TRAINING = {"steps": 12, "scheduler": "constant", "learning_rate": 0.05, "head_learning_rate": 0.1, "batch_size": 6}


BEST = {"best": "validation", "evaluations": 12}


def ran(write_spec: WriteSpec, folder: Path, method: Any = "lora", **training: Any) -> tuple[Plan, Result]:
    entry = {"name": method} if isinstance(method, str) else method
    plan = make_plan(read_spec(write_spec(folder, method=[entry], training=TRAINING | training)))
    (result,) = run_plan(plan, "a test")
    return plan, result


def adapter(plan: Plan) -> dict[str, torch.Tensor]:
    return load_file(plan.spec.output / "adapters" / plan.runs[0].key / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all weights are the same; the counters of the run, which know its length, are another matter."""
    weights = {name: t for name, t in one.items() if not name.endswith(".progress")}
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in weights.items())


def test_measuring_on_the_way_changes_nothing(write_spec: WriteSpec, tmp_path: Path) -> None:
    """Dropout draws the same numbers, and the last point of the curve is the score at the end."""
    method = {"name": "lora", "lora_dropout": 0.3}
    plain, without = ran(write_spec, tmp_path / "without", method)
    measured, found = ran(write_spec, tmp_path / "with", method, evaluations=5)
    assert same(adapter(plain), adapter(measured))
    assert (without.validation_curve, without.scored_step) == ([], 12)
    assert [step for step, _ in found.validation_curve] == [3, 5, 8, 10, 12]
    assert found.validation_curve[-1] == (12, without.validation_score) == (12, found.validation_score)
    assert (found.score, found.train_loss) == (without.score, without.train_loss)


@pytest.fixture(scope="module")
def whole(write_spec: WriteSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Result]:
    """A run that was never stopped, scored at its best step."""
    return ran(write_spec, tmp_path_factory.mktemp("whole"), **BEST)


def test_the_best_weights_are_those_of_a_run_that_stopped_there(
    whole: tuple[Plan, Result], write_spec: WriteSpec, tmp_path: Path
) -> None:
    plan, found = whole
    curve = dict(found.validation_curve)
    best = max(curve.values())
    assert found.scored_step == min(step for step, value in curve.items() if value == best)
    assert 1 < found.scored_step < 12, "the test needs a run that gets better and then worse"
    assert found.validation_score == best
    stopped, shorter = ran(write_spec, tmp_path / "stopped", steps=found.scored_step)
    assert same(adapter(plan), adapter(stopped))
    assert (found.score, found.extra_metrics) == (shorter.score, shorter.extra_metrics)
    assert found.export is not None
    # What is exported is what was scored: stock PEFT gives the same accuracy.
    tokenizer = plan.spec.task.open_processor(plan.spec.model)
    base = open_for(plan.spec.task, plan.spec.model, plan.splits)
    model = PeftModel.from_pretrained(base, str(plan.spec.output / found.export)).eval()
    with torch.no_grad():
        guess = model(**tokenizer(plan.splits.test["text"], padding=True, return_tensors="pt")).logits.argmax(-1)
    truth = [(plan.splits.labels or []).index(label) for label in plan.splits.test["label"]]
    assert found.score == pytest.approx(sum(g == t for g, t in zip(guess.tolist(), truth, strict=True)) / len(truth))


@pytest.mark.parametrize("name", ["adalora", "peft.AdaLoraConfig"])
def test_an_adaptive_method_is_not_scored_before_its_ranks_are_final(
    name: str, write_spec: WriteSpec, tmp_path: Path
) -> None:
    fields = {"init_r": 6, "target_r": 4, "tinit": 2, "tfinal": 4, "deltaT": 1}
    if name == "adalora":
        del fields["deltaT"]
    plan, found = ran(write_spec, tmp_path, {"name": name, **fields}, **BEST)
    assert plan.steps - fields["tfinal"] == 8
    assert len(found.validation_curve) == 12
    allowed = {step: value for step, value in found.validation_curve if step >= 8}
    assert found.scored_step == max(allowed, key=lambda step: allowed[step])
    if name == "adalora":
        assert found.mean_rank == 4.0


def test_full_fine_tuning_keeps_its_best_too(write_spec: WriteSpec, tmp_path: Path) -> None:
    _, found = ran(write_spec, tmp_path, "full", **BEST, learning_rate=1e-2)
    curve = dict(found.validation_curve)
    assert found.validation_score == max(curve.values())
    assert found.score >= 1 / 3
    assert not list((tmp_path / "out" / "checkpoints").glob("*/best-*"))


def kill_at(plan: Plan, step: int) -> None:
    """In a process of its own: run the plan, and die at a step of the run."""
    torch.set_num_threads(1)
    kill_at_step = step

    class Kill(Watch):
        def at_step(self, run: Run, step: int) -> None:
            if step == kill_at_step:
                os.kill(os.getpid(), signal.SIGKILL)

    run_plan(plan, "a test", Kill())


class Told(Watch):
    """The steps that were told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def at_step(self, run: Run, step: int) -> None:
        self.steps.append(step)


@pytest.mark.parametrize("step", [4, 9])
def test_a_killed_run_ends_with_the_same_best_weights(
    step: int, whole: tuple[Plan, Result], write_spec: WriteSpec, tmp_path: Path
) -> None:
    never_stopped, expected = whole
    plan = make_plan(read_spec(write_spec(tmp_path, training=TRAINING | BEST)))
    child = multiprocessing.get_context("fork").Process(target=kill_at, args=(plan, step))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    told = Told()
    (found,) = run_plan(plan, "a test", told)
    loading, first, *_ = told.steps
    assert loading == 0
    assert first > 1, "it did not start from the beginning"
    assert found.validation_curve == expected.validation_curve
    assert (found.scored_step, found.score) == (expected.scored_step, expected.score)
    assert same(adapter(plan), adapter(never_stopped))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"best": "test"}, r"^`training.best` must be last or validation; found 'test'$"),
        ({"evaluations": -1}, r"^`training.evaluations` must be an integer of at least 0; found -1$"),
        (
            {"best": "validation", "evaluations": 0},
            r"^`training.evaluations` must be at least 1 where best is \"validation\"; found 0$",
        ),
    ],
)
def test_mistakes(training: dict[str, Any], message: str, write_spec: WriteSpec, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        read_spec(write_spec(tmp_path, training=training))
