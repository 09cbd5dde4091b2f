"""A plan is run whole on a tiny model; what is finished is kept, and one process works on a folder at a time."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from filelock import FileLock, Timeout
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

import rankwise
from rankwise.adapters.configs import CONFIGS
from rankwise.base_models import open_tokenizer
from rankwise.compare import train
from rankwise.compare.asked import read_asked
from rankwise.compare.candidates.adapter import AdapterCandidate
from rankwise.compare.engines import Ended, Engine, Watch, here
from rankwise.compare.failures import FailedRunsError, Failure
from rankwise.compare.lock import LOCK
from rankwise.compare.models import open_for
from rankwise.compare.plan import Plan, Run, make_plan
from rankwise.compare.results import Result, read_results
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import read_spec
from rankwise.compare.tasks.classification import Classification
from rankwise.errors import RankwiseError

pytest_plugins = ["tiny_comparison"]

METHODS = list(CONFIGS)
COMMAND = "rankwise compare spec.toml"

WriteSpec = Callable[..., Path]


class Told(Watch):
    """Keeps the key of each run with each step, score and error that it is told of."""

    def __init__(self) -> None:
        self.log: list[tuple[str, object]] = []

    def at_step(self, run: Run, step: int) -> None:
        self.log.append((run.key, step))

    def finished(self, run: Run, result: Result) -> None:
        self.log.append((run.key, result.score))

    def failed(self, run: Run, failure: Failure) -> None:
        self.log.append((run.key, failure.error))


@dataclass(frozen=True)
class Comparison:
    """A finished comparison of all methods, and what was seen while it ran."""

    plan: Plan
    results: list[Result]
    predictions: dict[str, np.ndarray]
    """By a run's key: the trained model's outputs on the test split."""
    told: list[tuple[str, object]]

    @property
    def output(self) -> Path:
        return self.plan.spec.output

    def run(self, method: str) -> Run:
        return next(run for run in self.plan.runs if run.label == method)

    def result(self, method: str) -> Result:
        return next(result for result in self.results if result.label == method)


@pytest.fixture(scope="module")
def comparison(write_spec: WriteSpec, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    spec = read_spec(write_spec(tmp_path_factory.mktemp("comparison"), methods=METHODS))
    plan = make_plan(spec.with_floor())
    predictions: dict[str, np.ndarray] = {}
    told = Told()
    original = Trainer.predict

    def predict(self: Trainer, data: Any, *rest: Any, **named: Any) -> Any:
        found = original(self, data, *rest, **named)
        if len(data) == len(plan.splits.test):
            predictions[Path(str(self.args.output_dir)).name] = np.asarray(found.predictions)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "predict", predict)
        results = run_plan(plan, COMMAND, told)
    return Comparison(plan, results, predictions, told.log)


@dataclass
class Trained:
    """What the stand-in for training was asked to do, in order; at the `breaks`-th call it raises `error`."""

    keys: list[str]
    breaks: int | None = None
    error: BaseException | None = None


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, comparison: Comparison) -> Trained:
    """In place of training, a result made up at once."""
    log = Trained([])

    def train_run(plan: Plan, run: Run, output: Path, command: str, on_step: Callable[[int], None]) -> Result:
        log.keys.append(run.key)
        with pytest.raises(Timeout):
            FileLock(output / LOCK).acquire(timeout=0)
        if log.error is not None and len(log.keys) == log.breaks:
            raise log.error
        for step in range(1, plan.steps + 1):
            on_step(step)
        return comparison.result("lora").model_copy(
            update={"label": run.label, "method": run.entry.name, "seed": run.seed}
        )

    monkeypatch.setattr(here, "train_run", train_run)
    return log


@pytest.fixture
def four(write_spec: WriteSpec, tmp_path: Path) -> Plan:
    """A plan of four runs."""
    return make_plan(read_spec(write_spec(tmp_path, methods=["lora", "nnm"], seeds=[0, 1])))


def outputs(model: torch.nn.Module, plan: Plan) -> np.ndarray:
    """What a model says to the test split."""
    tokens = open_tokenizer(plan.spec.model)(plan.splits.test["text"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**tokens).logits.numpy()


def adapted(plan: Plan, folder: Path) -> PeftModel:
    """A saved adapter on the base model, whose own head is a fresh one."""
    return PeftModel.from_pretrained(open_for(plan.spec.task, plan.spec.model, plan.splits), str(folder))


# --- what a comparison leaves ----------------------------------------------------------------------------------------


def test_every_run_is_written_and_reads_back(comparison: Comparison) -> None:
    folder = comparison.output / "results"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{run.key}.json" for run in comparison.plan.runs)
    assert read_results(folder) == comparison.results
    assert [result.label for result in comparison.results] == sorted([*METHODS, "head"])


@pytest.mark.parametrize("method", METHODS)
def test_a_result_says_what_was_run(comparison: Comparison, method: str) -> None:
    result = comparison.result(method)
    assert (result.method, result.seed, result.task, result.metric) == (method, 0, "classification", "accuracy")
    assert (result.steps, result.batch_size, result.learning_rate, result.command) == (12, 12, 2e-2, COMMAND)
    assert [step for step, _ in result.train_loss] == list(range(1, 13))
    assert result.train_loss[-1][1] < result.train_loss[0][1]
    assert result.score > 0.5  # of three labels
    assert set(result.extra_metrics) == {"macro_f1"}
    assert result.fields["r"] == 4
    assert result.steps_skipped == 0
    assert set(result.ranks) == set(result.singular_values)
    assert len(result.ranks) == 12 + 1  # six linear layers in each of two blocks, and the pooler
    assert result.mean_rank == sum(result.ranks.values()) / len(result.ranks)
    assert result.versions["rankwise"] == rankwise.__version__


def test_parameters_are_counted_without_the_head(comparison: Comparison) -> None:
    linear = 2 * (4 * (32 + 32) + 2 * (32 + 64)) + (32 + 32)
    lora = comparison.result("lora")
    assert lora.parameters == {"initial": 4 * linear, "final": 4 * linear, "exported": 4 * linear}
    assert lora.head_parameters == 32 * 3 + 3
    assert comparison.result("sorsa").parameters["exported"] == 2 * 4 * linear  # the start is subtracted


def test_the_budget_falls_to_r(comparison: Comparison) -> None:
    adalora = comparison.result("adalora")
    assert (adalora.initial_mean_rank, adalora.mean_rank) == (6.0, 4.0)
    assert adalora.parameters["final"] < adalora.parameters["initial"]


def test_nothing_half_done_is_left(comparison: Comparison) -> None:
    expected = {run.key for run in comparison.plan.runs if run.label != "head"}  # the floor leaves a result alone
    for folder in ("adapters", "exports"):
        assert {path.name for path in (comparison.output / folder).iterdir()} == expected
    assert [path.name for path in comparison.output.rglob("*") if path.name.startswith(".")] == [LOCK]
    assert not (comparison.output / "failed").exists()


def test_the_table_and_the_page_show_every_method(comparison: Comparison) -> None:
    table = (comparison.output / "table.md").read_text().splitlines()
    assert table[0].startswith("| method | accuracy |")
    rows = sorted(line.split("|")[1].strip() for line in table[2:] if line.startswith("|"))
    assert rows == sorted([*METHODS, "head (floor)"])
    page = (comparison.output / "report.html").read_text()
    assert "<svg" in page
    assert all(method in page for method in METHODS)
    assert COMMAND in page


def test_progress_is_told_step_by_step(comparison: Comparison) -> None:
    expected: list[tuple[str, object]] = []
    for run in comparison.plan.runs:
        expected += [(run.key, 0)]  # before the model is loaded
        expected += [(run.key, step) for step in range(1, 13)]
        expected += [(run.key, comparison.result(run.label).score)]
    assert comparison.told == expected


@pytest.mark.parametrize("method", METHODS)
def test_adapters_reload_with_the_same_predictions(comparison: Comparison, method: str) -> None:
    key = comparison.run(method).key
    model = adapted(comparison.plan, comparison.output / "adapters" / key)
    assert rankwise.status(model).method == method
    assert rankwise.status(model).step == 12
    expected = comparison.predictions[key]
    np.testing.assert_allclose(outputs(model, comparison.plan), expected, atol=1e-5)
    with model.disable_adapter():
        assert np.abs(outputs(model, comparison.plan) - expected).max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_exports_are_plain_loras_with_the_same_predictions(comparison: Comparison, method: str) -> None:
    export = comparison.result(method).export
    assert export is not None
    folder = comparison.output / export
    assert folder == comparison.output / "exports" / comparison.run(method).key
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert written.keys() <= {field.name for field in dataclasses.fields(peft.LoraConfig)}
    config = PeftConfig.from_pretrained(str(folder))
    assert type(config) is peft.LoraConfig
    assert (config.lora_alpha, config.bias, config.use_rslora, config.rank_pattern) == (config.r, "none", False, {})
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name.rsplit(".", 2)[-2] for name in tensors} == {"lora_A", "lora_B", "classifier"}
    model = adapted(comparison.plan, folder)
    np.testing.assert_allclose(
        outputs(model, comparison.plan), comparison.predictions[comparison.run(method).key], atol=1e-5
    )


def test_a_result_keeps_gradient_norms_and_whole_spectra(comparison: Comparison) -> None:
    for result in comparison.results:
        assert [step for step, _ in result.gradient_norm] == list(range(1, 13))
        assert all(norm > 0 for _, norm in result.gradient_norm)
    assert {len(values) for values in comparison.result("lora").singular_values.values()} == {4}
    assert {len(values) for values in comparison.result("sorsa").singular_values.values()} == {8}


def test_the_ranks_of_an_export_are_in_the_result(comparison: Comparison) -> None:
    assert set(comparison.result("lora").exported_ranks.values()) == {4}
    assert set(comparison.result("sorsa").exported_ranks.values()) == {8}
    deep = comparison.result("deep")
    assert set(deep.ranks.values()) == {4}
    assert min(deep.exported_ranks.values()) < 4  # directions that stayed near 0 are not exported
    wide = re.compile(r"layer\.\d+\.(intermediate|output)\.dense")  # 32 to 64 and back; the others are 32 × 32
    exported = sum(rank * (96 if wide.search(name) else 64) for name, rank in deep.exported_ranks.items())
    assert deep.parameters["exported"] == exported


def test_the_floor_trains_the_head_and_nothing_else(comparison: Comparison) -> None:
    head, lora = comparison.result("head"), comparison.result("lora")
    assert head.head_parameters == lora.head_parameters == 32 * 3 + 3
    assert head.parameters == {"initial": 0, "final": 0, "exported": 0}
    assert (head.ranks, head.exported_ranks, head.singular_values, head.export) == ({}, {}, {}, None)
    assert (head.mean_rank, head.initial_mean_rank, head.starting_scale) == (None, None, None)
    assert head.learning_rate == head.head_learning_rate == 2e-2
    assert head.train_loss[-1][1] < head.train_loss[0][1]


def test_all_candidates_start_with_the_same_head_and_the_floor_leaves_the_model_alone(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The head before the first step is equal for all; at the floor's end the encoder is the pretrained one."""
    starts: dict[str, torch.Tensor] = {}
    ends: dict[str, dict[str, torch.Tensor]] = {}
    real = Trainer.train

    def recorded(self: Trainer, *rest: Any, **named: Any) -> Any:
        model: Any = self.model
        key = Path(str(self.args.output_dir)).name
        (head,) = [p for name, p in model.named_parameters() if p.requires_grad and p.shape == (3, 32)]
        starts[key] = head.detach().clone()
        done = real(self, *rest, **named)
        ends[key] = {name: p.detach() for name, p in model.named_parameters()}
        return done

    monkeypatch.setattr(Trainer, "train", recorded)
    chosen = ("lora", "adalora", "sorsa", "head")
    runs = [run for run in comparison.plan.runs if run.label in chosen]
    for run in runs:
        train.train_run(comparison.plan, run, tmp_path, COMMAND)
    first, *others = [starts[run.key] for run in runs]
    assert all(torch.equal(first, other) for other in others)
    (floor,) = [run for run in runs if run.label == "head"]
    plan = comparison.plan
    pretrained = open_for(plan.spec.task, plan.spec.model, plan.splits).state_dict()
    for name, value in ends[floor.key].items():
        assert torch.equal(value, pretrained[name]) or name.startswith("classifier")


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_second_run_trains_nothing(comparison: Comparison, trained: Trained) -> None:
    trained.breaks, trained.error = 1, AssertionError("a finished run was trained again")
    page = comparison.output / "report.html"
    page.unlink()
    told = Told()
    assert run_plan(comparison.plan, COMMAND, told) == comparison.results
    assert trained.keys == []
    assert told.log == [(run.key, comparison.result(run.label).score) for run in comparison.plan.runs]
    assert page.exists()


def test_what_an_edited_spec_left_is_not_shown(comparison: Comparison, write_spec: WriteSpec, trained: Trained) -> None:
    plan = make_plan(read_spec(write_spec(comparison.output.parent / "edited", methods=["lora", "sora"])))
    plan = dataclasses.replace(plan, spec=plan.spec.with_output(comparison.output))
    try:
        assert [result.label for result in run_plan(plan, COMMAND)] == ["lora", "sora"]
        assert "adalora" not in (comparison.output / "table.md").read_text()
        assert trained.keys == []
    finally:
        run_plan(comparison.plan, COMMAND)
    assert "adalora" in (comparison.output / "table.md").read_text()


def test_an_interrupt_keeps_what_is_finished(four: Plan, trained: Trained) -> None:
    trained.breaks, trained.error = 2, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_plan(four, COMMAND)
    results = four.spec.output / "results"
    (kept,) = results.iterdir()
    assert kept.name == f"{four.runs[0].key}.json"
    content = kept.read_bytes()

    trained.keys.clear()
    trained.error = None
    found = run_plan(four, COMMAND)
    assert trained.keys == [run.key for run in four.runs[1:]]
    assert [(result.label, result.seed) for result in found] == [("lora", 0), ("lora", 1), ("nnm", 0), ("nnm", 1)]
    assert kept.read_bytes() == content
    assert {path.suffix for path in results.iterdir()} == {".json"}


# --- runs that fail --------------------------------------------------------------------------------------------------


def test_a_failed_run_is_recorded_and_the_others_run(four: Plan, trained: Trained) -> None:
    trained.breaks, trained.error = 2, RuntimeError("out of memory: tried to get\n17 GiB <here>")
    told = Told()
    with pytest.raises(FailedRunsError, match=r"^1 run failed; .*failed has the whole errors") as raised:
        run_plan(four, COMMAND, told)
    assert trained.keys == [run.key for run in four.runs]
    failed = four.runs[1]
    sentence = f"failed: {failed.label}, seed 0, learning rate 0.02: RuntimeError: out of memory: tried to get"
    assert raised.value.notes == [sentence]
    assert str(raised.value).endswith(sentence)
    assert (failed.key, "RuntimeError: out of memory: tried to get") in told.log
    others = [run for run in four.runs if run is not failed]
    assert {(result.label, result.seed) for result in raised.value.results} == {(run.label, run.seed) for run in others}

    (record,) = (four.spec.output / "failed").iterdir()
    assert record.name == f"{failed.key}.json"
    written = json.loads(record.read_text())
    assert (written["label"], written["seed"], written["learning_rate"]) == (failed.label, 0, 2e-2)
    assert written["traceback"].startswith("Traceback (most recent call last)")
    assert "17 GiB <here>" in written["traceback"]
    for page in ("table.md", "report.html"):
        assert "failed: nnm, seed 0" in (four.spec.output / page).read_text()
    assert "<li>failed: nnm, seed 0" in (four.spec.output / "report.html").read_text()


def test_a_failed_run_is_tried_again(four: Plan, trained: Trained) -> None:
    trained.breaks, trained.error = 2, RuntimeError("out of memory")
    for _ in range(2):  # it fails again
        with pytest.raises(FailedRunsError):
            run_plan(four, COMMAND)
        trained.breaks = 1
        assert len(list((four.spec.output / "failed").iterdir())) == 1
        trained.keys.clear()
    trained.error = None
    assert len(run_plan(four, COMMAND)) == 4
    assert trained.keys == [four.runs[1].key]
    assert not (four.spec.output / "failed").exists()
    for page in ("table.md", "report.html"):
        assert "failed" not in (four.spec.output / page).read_text()


def test_where_all_runs_fail_there_is_no_page(four: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_run(*_: object) -> Result:
        raise OSError

    monkeypatch.setattr(here, "train_run", train_run)
    with pytest.raises(FailedRunsError, match=r"^4 runs failed; .*OSError: no message$") as raised:
        run_plan(four, COMMAND)
    assert raised.value.results == []
    assert len(list((four.spec.output / "failed").iterdir())) == 4
    assert not (four.spec.output / "report.html").exists()


def test_a_result_that_is_not_finite_is_a_failure(
    four: Plan, trained: Trained, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_run(plan: Plan, run: Run, *_: object) -> Result:
        score = float("nan") if run is four.runs[0] else 0.5
        return comparison.result("lora").model_copy(update={"label": run.label, "seed": run.seed, "score": score})

    monkeypatch.setattr(here, "train_run", train_run)
    with pytest.raises(FailedRunsError, match="holds a number that is not finite") as raised:
        run_plan(four, COMMAND)
    assert [failure.key for failure in raised.value.failures] == [four.runs[0].key]
    assert len(raised.value.results) == 3


def test_a_run_that_failed_after_its_export_is_done_again(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(read_spec(write_spec(tmp_path, training={"steps": 2})))
    exports = plan.spec.output / "exports"

    def full(candidate: object, model: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(AdapterCandidate, "measure", full)
        with pytest.raises(FailedRunsError, match="no space"):
            run_plan(plan, COMMAND)
    assert [path.name for path in exports.iterdir()] == [plan.runs[0].key]
    assert not (plan.spec.output / "results").exists()
    (result,) = run_plan(plan, COMMAND)
    assert result.export is not None
    assert (plan.spec.output / result.export / "adapter_model.safetensors").exists()


# --- one process over a folder ---------------------------------------------------------------------------------------


def test_a_folder_that_another_process_works_on_is_refused(four: Plan, trained: Trained) -> None:
    four.spec.output.mkdir()
    other = FileLock(four.spec.output / LOCK)
    with other, pytest.raises(RankwiseError) as raised:
        run_plan(four, COMMAND)
    assert str(raised.value) == f"{four.spec.output} is in use by another process: wait for its end, or write elsewhere"
    assert trained.keys == []
    assert len(run_plan(four, COMMAND)) == 4


def test_a_folder_is_free_again_after_an_error(four: Plan, trained: Trained) -> None:
    trained.breaks, trained.error = 1, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_plan(four, COMMAND)
    with FileLock(four.spec.output / LOCK).acquire(timeout=0):
        pass


# --- what reaches training -------------------------------------------------------------------------------------------


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The peak and the present learning rate of the optimiser at each run's first step."""
    seen: list[tuple[float, float]] = []

    class Recorder(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            if state.global_step == 0:
                adapter, head = optimizer.param_groups
                assert head["initial_lr"] == 2e-2  # the SPEC's, whatever the adapter's rate is
                assert adapter["weight_decay"] == head["weight_decay"] == args.weight_decay == 0.0
                seen.append((adapter["initial_lr"], adapter["lr"]))

    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, Recorder]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)
    return seen


def test_an_entrys_learning_rate_reaches_the_optimiser(
    write_spec: WriteSpec, tmp_path: Path, rates: list[tuple[float, float]]
) -> None:
    entries = [{"name": "lora"}, {"name": "lora", "learning_rate": 5e-3}]
    path = write_spec(tmp_path, method=entries, training={"steps": 2, "learning_rate": 2e-3})
    results = run_plan(make_plan(read_spec(path)), COMMAND)
    assert {result.label: result.learning_rate for result in results} == {"lora": 2e-3, "lora lr=0.005": 5e-3}
    assert rates == [(2e-3, 2e-3), (5e-3, 5e-3)]


def test_warmup_reaches_the_optimiser(write_spec: WriteSpec, tmp_path: Path, rates: list[tuple[float, float]]) -> None:
    path = write_spec(tmp_path, training={"steps": 4, "learning_rate": 2e-3, "warmup": 0.5})
    run_plan(make_plan(read_spec(path)), COMMAND)
    assert rates == [(2e-3, 0.0)]


def test_fields_of_an_entry_reach_the_adapter(write_spec: WriteSpec, tmp_path: Path) -> None:
    entries = [{"name": "sora", "r": 3, "gate_init": "ones", "sparse_weight": 0.0}]
    plan = make_plan(read_spec(write_spec(tmp_path, method=entries, training={"steps": 1})))
    (result,) = run_plan(plan, COMMAND)
    assert (result.fields["r"], result.fields["gate_init"]) == (3, "ones")
    saved = PeftConfig.from_pretrained(str(plan.spec.output / "adapters" / plan.runs[0].key))
    assert isinstance(saved, rankwise.SoraConfig)
    assert (saved.r, saved.gate_init) == (3, "ones")


def test_equal_seeds_give_equal_bits(comparison: Comparison, write_spec: WriteSpec, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # what went before must not matter
    plan = make_plan(read_spec(write_spec(tmp_path, methods=METHODS[::-1])).with_floor())
    again = run_plan(plan, COMMAND)
    for run in plan.runs:
        for folder in ("adapters", "exports") if run.label != "head" else ():
            file = Path(folder) / run.key / "adapter_model.safetensors"
            assert (plan.spec.output / file).read_bytes() == (comparison.output / file).read_bytes(), file
    for first, second in zip(comparison.results, again, strict=True):
        assert (first.label, first.score, first.train_loss) == (second.label, second.score, second.train_loss)


def test_another_seed_gives_another_adapter(comparison: Comparison, write_spec: WriteSpec, tmp_path: Path) -> None:
    plan = make_plan(read_spec(write_spec(tmp_path, seeds=[1])))
    run_plan(plan, COMMAND)
    one, other = (
        load_file(output / "adapters" / key / "adapter_model.safetensors")
        for output, key in ((comparison.output, comparison.run("lora").key), (plan.spec.output, plan.runs[0].key))
    )
    assert one.keys() == other.keys()
    assert all(not torch.equal(one[name], other[name]) for name in one if "A" in name.split("."))


def test_regression_on_pairs(write_spec: WriteSpec, tiny: Path, tmp_path: Path) -> None:
    data = {name: str(tiny / f"pairs-{name}.jsonl") for name in ("train", "test")}
    path = write_spec(
        tmp_path,
        methods=["nnm"],
        data=data | {"pair": "other_text", "label": "score"},
        task={"type": "regression"},
        training={"steps": 30},
    )
    plan = make_plan(read_spec(path))
    assert plan.splits.labels is None
    (result,) = run_plan(plan, COMMAND)
    assert (result.task, result.metric, set(result.extra_metrics)) == ("regression", "spearman", {"pearson"})
    assert result.score > 0.5  # the second text alone tells the target: without it every guess is the same
    assert result.head_parameters == 32 + 1
    model = adapted(plan, plan.spec.output / "adapters" / plan.runs[0].key)
    assert model.config.num_labels == 1


# --- killed and started again ----------------------------------------------------------------------------------------


def kill_at(plan: Plan, step: int) -> None:
    """In a process of its own: run the plan, and die at a step of the first run or, at -1, once it has trained."""
    torch.set_num_threads(1)
    if step < 0:
        Classification.score = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]

    kill_at_step = step

    class Kill(Watch):
        def at_step(self, run: Run, step: int) -> None:
            if step == kill_at_step:
                os.kill(os.getpid(), signal.SIGKILL)

    run_plan(plan, COMMAND, Kill())


@pytest.mark.parametrize("step", [4, 9, -1])
def test_a_killed_run_goes_on_from_its_checkpoint(step: int, write_spec: WriteSpec, tmp_path: Path) -> None:
    """The lock of the dead process holds nobody up, and the adapter ends with the same bits."""
    ends = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        plan = make_plan(read_spec(write_spec(tmp_path / name, methods=["adalora"], training={"steps": 12})))
        if name == "killed":
            child = multiprocessing.get_context("fork").Process(target=kill_at, args=(plan, step))
            child.start()
            child.join()
            assert child.exitcode == -signal.SIGKILL
            assert (plan.spec.output / LOCK).exists()
        told = Told()
        (result,) = run_plan(plan, COMMAND, told)
        (_, loading), (_, first), *_, (_, last), _ = told.log
        assert (loading, last) == (0, 12)
        assert isinstance(first, int)
        assert (first > 1) == (name == "killed"), "it started from the beginning"
        assert not list((plan.spec.output / "checkpoints").glob("*"))
        (folder,) = (plan.spec.output / "adapters").iterdir()
        ends.append(load_file(folder / "adapter_model.safetensors"))
        assert result.steps == 12
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], t) for key, t in ends[1].items())


# --- learning rates --------------------------------------------------------------------------------------------------


def test_a_list_of_rates_is_searched_with_the_first_seed(write_spec: WriteSpec, tmp_path: Path) -> None:
    """The other seeds run at the best rate on validation data alone, and a second call finds everything done."""
    spec = read_spec(
        write_spec(
            tmp_path,
            methods=["lora"],
            seeds=[0, 1],
            training={"learning_rate": [1e-6, 2e-2]},
        )
    )
    plan = make_plan(spec.with_floor())
    told = Told()
    results = run_plan(plan, COMMAND, told)
    ran = sorted((result.label, result.seed, result.learning_rate) for result in results)
    assert ran == [("head", 0, 2e-2), ("head", 1, 2e-2), ("lora", 0, 1e-6), ("lora", 0, 2e-2), ("lora", 1, 2e-2)]
    assert plan.count == len(results) == len({key for key, _ in told.log})
    page = (spec.output / "report.html").read_text()
    assert "Score by learning rate" in page
    assert run_plan(plan, COMMAND) == results


@dataclass
class Search:
    """Two methods, each with two rates and two seeds, and what was trained of them."""

    plan: Plan
    trained: list[tuple[str, int, float]]


@pytest.fixture
def search(write_spec: WriteSpec, tmp_path: Path, comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> Search:
    """In place of training: the larger rate is the better one, but for LoRA it fails at seed 0."""
    spec = write_spec(tmp_path, methods=["lora", "nnm"], seeds=[0, 1], training={"learning_rate": [1e-3, 1e-2]})
    found = Search(make_plan(read_spec(spec)), [])

    def train_run(plan: Plan, run: Run, *_: object) -> Result:
        found.trained.append((run.label, run.seed, run.learning_rate))
        if (run.label, run.seed, run.learning_rate) == ("lora", 0, 1e-2):
            raise RuntimeError("it diverged")
        about = {"label": run.label, "method": run.entry.name, "seed": run.seed}
        rate = {"learning_rate": run.learning_rate, "validation_score": run.learning_rate}
        return comparison.result("lora").model_copy(update=about | rate)

    monkeypatch.setattr(here, "train_run", train_run)
    return found


def test_a_search_goes_on_without_a_rate_that_failed_and_says_so(search: Search) -> None:
    with pytest.raises(FailedRunsError) as raised:
        run_plan(search.plan, COMMAND)
    first_seed = [("lora", 0, 1e-3), ("lora", 0, 1e-2), ("nnm", 0, 1e-3), ("nnm", 0, 1e-2)]
    assert search.trained == [*first_seed, ("lora", 1, 1e-3), ("nnm", 1, 1e-2)]
    assert raised.value.notes == [
        "failed: lora, seed 0, learning rate 0.01: RuntimeError: it diverged",
        "lora: its learning rate is the best of those that ran; 1 failed",
    ]
    asked = read_asked(search.plan.spec.output)
    assert asked is not None
    assert asked.rates == {"lora": (1e-3, 1e-2), "nnm": (1e-3, 1e-2)}
    assert {run.key for run in search.plan.runs} <= set(asked.runs)
    assert len(raised.value.results) == 5


def test_a_search_in_which_every_rate_failed_ends_there(
    search: Search, monkeypatch: pytest.MonkeyPatch, comparison: Comparison
) -> None:
    def train_run(plan: Plan, run: Run, *_: object) -> Result:
        raise RuntimeError("nothing works")

    monkeypatch.setattr(here, "train_run", train_run)
    with pytest.raises(FailedRunsError, match=r"^4 runs failed") as raised:
        run_plan(search.plan, COMMAND)
    assert raised.value.notes[4:] == [
        f"{method}: its other seeds have not run, since every rate of its search failed" for method in ("lora", "nnm")
    ]


def test_other_seeds_start_as_soon_as_their_own_search_has_ended(search: Search, comparison: Comparison) -> None:
    log: list[tuple[str, str, int, float]] = []

    class InTurns(Engine):
        """Ends runs in their order, and gives each its rate as its score."""

        runs: list[Run]

        def start(self, plan: Plan, command: str, watch: Watch) -> None:
            self.runs = []

        def submit(self, run: Run) -> None:
            log.append(("submitted", run.label, run.seed, run.learning_rate))
            self.runs.append(run)

        def next_ended(self) -> Ended:
            run = self.runs.pop(0)
            log.append(("ended", run.label, run.seed, run.learning_rate))
            about = {"label": run.label, "seed": run.seed, "learning_rate": run.learning_rate}
            about |= {"validation_score": run.learning_rate}
            result = comparison.result("lora").model_copy(update=about)
            return Ended(run, result)

        def stop(self) -> None:
            self.runs = []

    assert len(run_plan(search.plan, COMMAND, engine=InTurns())) == 6
    assert log[4:] == [
        ("ended", "lora", 0, 1e-3),
        ("ended", "lora", 0, 1e-2),
        ("submitted", "lora", 1, 1e-2),
        ("ended", "nnm", 0, 1e-3),
        ("ended", "nnm", 0, 1e-2),
        ("submitted", "nnm", 1, 1e-2),
        ("ended", "lora", 1, 1e-2),
        ("ended", "nnm", 1, 1e-2),
    ]
