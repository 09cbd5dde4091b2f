"""What a plan refuses before any weight is loaded, and what a run's key and label depend on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer

import rankwise
from rankwise.adapters.configs import CONFIGS
from rankwise.compare import models, provenance, runner
from rankwise.compare import plan as planning
from rankwise.compare.engines import here
from rankwise.compare.plan import Plan, make_plan
from rankwise.compare.spec import read_spec
from rankwise.compare.train import train_run
from rankwise.errors import RankwiseError
from rankwise.methods import METHODS

pytest_plugins = ["tiny_comparison"]

Refuse = Callable[..., None]
WriteSpec = Callable[..., Path]


@pytest.fixture
def nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model's weights or training a run fails the test at once."""

    def too_late(*_: object, **__: object) -> None:
        pytest.fail("weights were loaded or a run was started")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", too_late)
    monkeypatch.setattr(here, "train_run", too_late)


@pytest.fixture
def refuse(nothing_trains: None, write_spec: WriteSpec, tmp_path: Path) -> Refuse:
    """Checks that a SPEC with these changes is refused in one sentence, before anything is loaded or written."""

    def check(message: str, **changes: Any) -> None:
        path = write_spec(tmp_path, **changes)
        with pytest.raises(RankwiseError, match=message) as raised:
            runner.run_plan(make_plan(read_spec(path)), "")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()

    return check


def planned(write_spec: WriteSpec, folder: Path, **changes: Any) -> Plan:
    return make_plan(read_spec(write_spec(folder, **changes)))


def keys(plan: Plan) -> dict[tuple[str, int], str]:
    return {(run.label, run.seed): run.key for run in plan.runs}


@pytest.mark.usefixtures("nothing_trains")
def test_a_good_spec_is_planned_without_weights(write_spec: WriteSpec, tmp_path: Path) -> None:
    plan = planned(write_spec, tmp_path, methods=["lora", "nnm", "adalora", "sora", "sorsa"], seeds=[0, 3])
    assert [(run.label, run.seed) for run in plan.runs] == [
        (label, seed) for seed in (0, 3) for label in ("lora", "nnm", "adalora", "sora", "sorsa")
    ]
    assert plan.splits.labels == ["colour", "food", "music"]
    assert plan.steps == 12
    assert not (tmp_path / "out").exists()
    with pytest.raises(pytest.fail.Exception, match="a run was started"):  # the guard of this file's tests holds
        runner.run_plan(plan, "")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "adalor"}, r"^`methods` .*\(the nearest names are adalora, alora, salora\); found 'adalor'$"),
        (
            {"name": "nnm", "nuclear_wieght": 1.0},
            r"^`nnm.nuclear_wieght` must be a field of the method \(the nearest names are nuclear_weight, .*found 1.0$",
        ),
        ({"name": "lora", "nuclear_weight": 1.0}, r"^`lora.nuclear_weight` must be a field of the method"),
        ({"name": "lora", "r": 0}, r"^`r` must be a whole number ≥ 1; found 0$"),
        ({"name": "lora", "r": "8"}, r"^`r` must be a whole number ≥ 1; found '8'$"),
        ({"name": "adalora", "init_r": 2}, r"^`init_r` must be at least target_r \(4\); found 2$"),
        ({"name": "nnm", "nuclear_weight": -1}, r"^`nuclear_weight` must be a number ≥ 0; found -1$"),
        ({"name": "sora", "sparse_weight": -0.5}, r"^`sparse_weight` must be a number ≥ 0; found -0.5$"),
        ({"name": "sora", "gate_init": "zeros"}, r"^`gate_init` must be one of normal, ones; found 'zeros'$"),
        ({"name": "lora", "lora_dropout": 1.0}, r"^`lora_dropout` must be a number in \[0, 1\); found 1.0$"),
        (
            {"name": "adalora", "tinit": 8, "tfinal": 5},
            r"^`tinit \+ tfinal` must be less than total_step \(12\); found 13$",
        ),
        (
            {"name": "adalora", "tinit": 4, "tfinal": 5, "total_step": 9},
            r"^`tinit \+ tfinal` must be less than total_step \(9\); found 9$",
        ),
    ],
)
def test_bad_methods(refuse: Refuse, method: dict[str, object], message: str) -> None:
    refuse(message, method=[{"name": "lora", "lora_alpha": 4.0}, method])  # the second of two: all are checked


def test_rank_zero_in_the_budget(refuse: Refuse) -> None:
    refuse(r"^`budget.r` must be an integer of at least 1; found 0$", budget={"r": 0})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qurey"], r"^`target_modules` must name modules .*\(the nearest names are query, \w+, \w+\); found 'qurey'$"),
        (["query", "valeu"], r"nearest names are value, .*; found 'valeu'$"),
        (
            ["bert.encoder.layer.0.attention.self.qury"],
            r"nearest names are bert.encoder.layer.0.attention.self.query, ",
        ),
        (["LayerNorm"], r"^`target_modules` must name linear layers, .*; found '.*LayerNorm: LayerNorm'$"),
        pytest.param(
            "qurey",
            r"^`target_modules` must .*; found 'qurey'$",
        ),
    ],
)
def test_target_modules_that_cannot_be_adapted(refuse: Refuse, targets: object, message: str) -> None:
    refuse(message, task={"target_modules": targets})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "lora", "bias": "all"}, "bias"),  # an export could not hold it, which is known beforehand
        ({"name": "lora", "modules_to_save": ["poler"]}, "modules_to_save"),
        ({"name": "lora", "task_type": "CAUSAL_LM"}, "task_type"),
        ({"name": "lora", "rank_pattern": 3}, "rank_pattern"),
        ({"name": "lora", "target_modules": 3}, "target_modules"),
    ],
)
def test_fields_that_no_run_could_use(refuse: Refuse, method: dict[str, object], message: str) -> None:
    refuse(message, method=[method])


@pytest.mark.parametrize("model", ["./no-such-model", "no/such/model", "../model"])
def test_a_model_that_does_not_exist(refuse: Refuse, model: str) -> None:
    refuse(rf"^`model` must be a folder, hub id or embedded model with a tokenizer; found '{model}'$", model=model)


def test_a_model_without_a_sequence_classifier(refuse: Refuse, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}')
    refuse("^`model` must be .* that can be trained for classification; found '.*model'$", model="model")


def test_a_model_without_a_tokenizer(refuse: Refuse, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))
    refuse("^`model` must be a folder, hub id or embedded model with a tokenizer; found '.*model'$", model="model")


def test_a_model_without_weights(refuse: Refuse, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    refuse("^`model` must ", model="model")


def test_texts_longer_than_the_model_can_read(refuse: Refuse) -> None:
    refuse(r"^`task.max_length` must be .*32; found 33$", task={"max_length": 33})


def test_a_missing_data_file(refuse: Refuse) -> None:
    refuse(r"nowhere\.jsonl is missing, or is not a file$", data={"train": "nowhere.jsonl"})


@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_an_empty_data_file(refuse: Refuse, tmp_path: Path, split: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    refuse(r"empty\.jsonl holds no rows$", data={split: "empty.jsonl"})


@pytest.mark.parametrize("key", ["text", "label", "pair"])
def test_a_missing_column(refuse: Refuse, key: str) -> None:
    refuse(
        rf"train\.jsonl has no column 'txet', as `data\.{key}` asks: the nearest names are text, intent, its columns",
        data={key: "txet"},
    )


def test_a_label_that_training_never_saw(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "red", "intent": "colour"}\n{"text": "red", "intent": "sport"}\n')
    refuse(r"test\.jsonl has the label 'sport', which .*train\.jsonl never shows$", data={"test": "test.jsonl"})


def test_steps_follow_from_epochs(write_spec: WriteSpec, tmp_path: Path) -> None:
    plan = planned(write_spec, tmp_path, training={"steps": None, "epochs": 1.5})
    assert len(plan.splits.train) == 54  # 60 without a tenth for validation: 5 batches of 12 at most
    assert plan.steps == 8


def test_a_seed_draws_the_same_examples_for_every_candidate(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the trainers: two seeds, two candidates, and epochs counted by the draw."""
    seen: dict[tuple[str, int], list[int]] = {}

    def watched(self: Trainer, *_: Any, **__: Any) -> None:
        labels = [int(label) for label in self.train_dataset["labels"]]  # type: ignore[index]
        key = Path(str(self.args.output_dir)).name
        seen[key.split("--")[0], int(key.rpartition("seed")[2])] = [
            *labels,
            *[token for row in self.train_dataset["input_ids"] for token in row],  # type: ignore[index]
        ]

    monkeypatch.setattr(Trainer, "train", watched)
    training = {"steps": None, "epochs": 2}
    plan = planned(write_spec, tmp_path, methods=["lora", "nnm"], seeds=[0, 1], data={"samples": 24}, training=training)
    assert plan.steps == 4  # two passes over 24 examples in batches of 12
    for run in plan.runs:
        train_run(plan, run, tmp_path / "out", "")
    assert seen["lora", 0] == seen["nnm", 0] != seen["lora", 1] == seen["nnm", 1]
    assert all(sorted(found[:24]) == [0] * 8 + [1] * 8 + [2] * 8 for found in seen.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"method": [{"name": "nnm", "nuclear_weight": 2.0}]},
        {"method": [{"name": "nnm", "learning_rate": 1e-2}]},
        {"training": {"learning_rate": 1e-2}},
        {"training": {"head_learning_rate": 1e-3}},
        {"training": {"steps": 13}},
        {"training": {"batch_size": 4}},
        {"training": {"warmup": 0.2}},
        {"budget": {"r": 5}},
        {"task": {"max_length": 15}},
        {"task": {"target_modules": ["query"]}},
        {"data": {"per_label": 10}},
        {"data": {"samples": 30}},
        {"training": {"evaluations": 2}},
        {"training": {"best": "validation"}},
    ],
)
def test_what_changes_a_key(write_spec: WriteSpec, tmp_path: Path, changes: dict[str, Any]) -> None:
    (base,) = planned(write_spec, tmp_path, method=[{"name": "nnm"}]).runs
    (changed,) = planned(write_spec, tmp_path, **{"method": [{"name": "nnm"}]} | changes).runs
    assert changed.key != base.key
    assert changed.label == base.label == "nnm"


@pytest.mark.parametrize("split", ["train", "test", "validation"])
def test_a_key_changes_with_the_contents_of_the_data(
    write_spec: WriteSpec, tiny: Path, tmp_path: Path, split: str
) -> None:
    own = tmp_path / "own.jsonl"
    rows = (tiny / "train.jsonl").read_text()
    own.write_text(rows)
    before = planned(write_spec, tmp_path, data={split: "own.jsonl"})
    assert keys(planned(write_spec, tmp_path, data={split: "own.jsonl"})) == keys(before)
    own.write_text(rows + json.dumps({"text": "red", "intent": "colour"}) + "\n")
    (key,) = keys(planned(write_spec, tmp_path, data={split: "own.jsonl"})).values()
    assert key not in keys(before).values()


def test_what_does_not_change_a_key(write_spec: WriteSpec, tmp_path: Path) -> None:
    base = keys(planned(write_spec, tmp_path, methods=["lora", "nnm"], seeds=[0, 1]))
    assert len(set(base.values())) == len(base) == 4
    assert base == keys(planned(write_spec, tmp_path, methods=["lora", "nnm"], seeds=[0, 1], output="elsewhere"))
    assert base == keys(planned(write_spec, tmp_path, methods=["nnm", "lora"], seeds=[0, 1]))
    assert base == keys(planned(write_spec, tmp_path, methods=["lora", "nnm"], seeds=[1, 0]))
    more = keys(planned(write_spec, tmp_path, methods=["sora", "lora", "nnm"], seeds=[5, 1, 0]))
    assert len(set(more.values())) == len(more) == 9
    assert base.items() <= more.items()


def test_moving_the_folder_does_not_change_a_key(write_spec: WriteSpec, tiny: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        shutil.copytree(tiny, tmp_path / name)
        files = {"train": "train.jsonl", "test": "test.jsonl"}
        found.append(keys(planned(write_spec, tmp_path / name, model="model", data=files)))
    assert found[0] == found[1]


def test_labels_tell_entries_of_one_method_apart(write_spec: WriteSpec, tmp_path: Path) -> None:
    entries = [
        {"name": "lora"},
        {"name": "nnm"},
        {"name": "nnm", "nuclear_weight": 2.0},
        {"name": "nnm", "learning_rate": 1e-2},
        {"name": "nnm", "nuclear_weight": 2.0, "learning_rate": 1e-2},
    ]
    runs = planned(write_spec, tmp_path, method=entries).runs
    assert [run.label for run in runs] == [
        "lora",
        "nnm",
        "nnm nuclear_weight=2.0",
        "nnm lr=0.01",
        "nnm lr=0.01 nuclear_weight=2.0",
    ]
    assert [run.learning_rate for run in runs] == [2e-2, 2e-2, 2e-2, 1e-2, 1e-2]
    assert len({run.key for run in runs}) == 5


def test_the_floor_is_added_once_and_has_the_heads_rate(write_spec: WriteSpec, tmp_path: Path) -> None:
    training = {"head_learning_rate": 5e-3}
    spec = read_spec(write_spec(tmp_path, methods=["lora"], seeds=[0, 1], training=training)).with_floor()
    assert spec.with_floor() == spec
    plan = make_plan(spec)
    rates = [(run.label, run.seed, run.learning_rate) for run in plan.runs]
    assert rates == [("lora", 0, 2e-2), ("head", 0, 5e-3), ("lora", 1, 2e-2), ("head", 1, 5e-3)]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "head", "r": 4}, r"^`head.r` must be left out: the head alone has no fields; found 4$"),
        (
            {"name": "head", "learning_rate": 1e-3},
            r"^`head.learning_rate` must be left out: the head's rate is training.head_learning_rate, .*; found 0.001$",
        ),
    ],
)
def test_the_head_alone_has_nothing_to_set(refuse: Refuse, entry: dict[str, object], message: str) -> None:
    refuse(message, method=[{"name": "lora"}, entry])


def test_a_key_changes_with_the_versions_of_the_libraries(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(planned(write_spec, tmp_path))
    for library in provenance.LIBRARIES:
        real = provenance.version
        with monkeypatch.context() as patch:
            patch.setattr(
                provenance, "version", lambda name, of=library, real=real: "9.9" if name == of else real(name)
            )
            assert keys(planned(write_spec, tmp_path)) != before, library
    assert keys(planned(write_spec, tmp_path)) == before


def test_a_key_changes_with_the_suggested_rate_where_it_is_taken(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"learning_rate": None}
    before = keys(planned(write_spec, tmp_path, training=training))
    given = keys(planned(write_spec, tmp_path, method=[{"name": "lora", "learning_rate": 1e-3}], training=training))
    monkeypatch.setattr(METHODS["lora"], "suggested_rate", 7e-3)
    assert keys(planned(write_spec, tmp_path, training=training)) != before
    again = keys(planned(write_spec, tmp_path, method=[{"name": "lora", "learning_rate": 1e-3}], training=training))
    assert again == given


def test_the_suggested_rate_is_that_of_the_entrys_own_fields(write_spec: WriteSpec, tmp_path: Path) -> None:
    methods = [{"name": "deep"}, {"name": "deep", "init": "random"}]
    runs = planned(write_spec, tmp_path, method=methods, training={"learning_rate": None}).runs
    rates = {run.learning_rate for run in runs if run.label.startswith("deep")}
    assert rates == {CONFIGS["deep"](**fields).suggest_rate() for fields in ({}, {"init": "random"})}
    assert len(rates) == 2


def test_a_key_changes_with_the_contents_of_a_hub_data_set(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = {"dataset": "somebody/intents", "train": None, "test": None}
    rows = [{"text": "red", "intent": "colour"}, {"text": "milk", "intent": "food"}] * 10

    def load(name: str) -> datasets.DatasetDict:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = keys(planned(write_spec, tmp_path, data=hub))
    assert keys(planned(write_spec, tmp_path, data=hub)) == before
    rows[0] = {"text": "green", "intent": "colour"}  # the same name, another revision
    assert keys(planned(write_spec, tmp_path, data=hub)) != before


def test_a_key_changes_with_the_revision_of_a_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        models.identity("somebody/model")
        for revision in ("1a", "1a", "2b")
        if monkeypatch.setattr(
            models.AutoConfig, "from_pretrained", lambda name, revision=revision: SimpleNamespace(_commit_hash=revision)
        )
        is None
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_key_changes_with_the_files_of_a_model_folder(
    write_spec: WriteSpec, tiny: Path, tmp_path: Path, file: str
) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    before = keys(planned(write_spec, tmp_path, model="model"))
    path = tmp_path / "model" / file
    if file.endswith(".json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "another"}))
    else:
        tensors = load_file(path)
        name = max(tensors, key=lambda name: tensors[name].numel())
        save_file(tensors | {name: tensors[name] + 1}, path, metadata={"format": "pt"})
    assert keys(planned(write_spec, tmp_path, model="model")) != before


def test_data_and_model_are_hashed_once_for_all_runs(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    identity, digest = planning.identity, planning._digest
    monkeypatch.setattr(planning, "identity", lambda name: asked.append(name) or identity(name))
    monkeypatch.setattr(planning, "_digest", lambda value: asked.append("digest") or digest(value))
    planned(write_spec, tmp_path, methods=["lora", "nnm", "sora"], seeds=[0, 1, 2])
    assert len([name for name in asked if name != "digest"]) == 1
    assert asked.count("digest") == 2 + 3  # the data, what all runs share, and each method with its rate


def test_a_key_changes_with_a_default(write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(planned(write_spec, tmp_path, methods=["sora"]))
    original = rankwise.SoraConfig.__init__

    def another_default(self: Any, *args: Any, **given: Any) -> None:
        original(self, *args, **{"sparse_weight": 0.125} | given)

    monkeypatch.setattr(rankwise.SoraConfig, "__init__", another_default)
    assert keys(planned(write_spec, tmp_path, methods=["sora"])) != before


def test_one_rate_is_one_run_whichever_key_gives_it(write_spec: WriteSpec, tmp_path: Path) -> None:
    by_section = planned(write_spec, tmp_path, methods=["lora"], training={"learning_rate": 5e-3})
    by_entry = planned(write_spec, tmp_path, method=[{"name": "lora", "learning_rate": 5e-3}])
    assert keys(by_section) == keys(by_entry)
