"""Baselines through stock code: each gives what a plain script gives, and says in one sentence what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rankwise.compare.candidates import candidate_of
from rankwise.compare.candidates.stock import StockCandidate
from rankwise.compare.evaluate import evaluate_adapter
from rankwise.compare.plan import Plan, make_plan
from rankwise.compare.results import Result
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import read_spec
from rankwise.compare.tasks.classification import Classification
from rankwise.errors import ArgumentError
from rankwise.export.reader import read_lora
from tiny_comparison import WriteSpec

pytest_plugins = ["tiny_comparison"]

TARGETS = ["query", "value"]
STOCK: list[dict[str, Any]] = [
    {"name": "peft.LoraConfig"},
    {"name": "peft.LoraConfig", "use_rslora": True, "label": "rsLoRA"},
    {"name": "peft.LoraConfig", "use_dora": True, "label": "DoRA"},
    {"name": "peft.LoraConfig", "init_lora_weights": "pissa", "label": "PiSSA"},
    {"name": "peft.LoraConfig", "init_lora_weights": "olora", "label": "OLoRA"},
    {"name": "peft.LoraConfig", "init_lora_weights": "eva", "label": "EVA"},
    {
        "name": "peft.AdaLoraConfig",
        "init_r": 6,
        "target_r": 4,
        "tinit": 2,
        "tfinal": 4,
        "deltaT": 1,
        "label": "AdaLoRA",
    },
    {"name": "peft.IA3Config", "feedforward_modules": [], "label": "IA3"},
    {"name": "peft.OFTConfig", "r": 0, "oft_block_size": 8, "label": "OFT"},
    {"name": "full", "learning_rate": 1e-3},
    {"name": "partial", "modules": ["query", "intermediate.dense"], "learning_rate": 1e-3},
]
NAMES = [entry.get("label", entry["name"]) for entry in STOCK]


@pytest.fixture(scope="module")
def stock(write_spec: WriteSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[Result]]:
    """One run of every baseline."""
    folder = tmp_path_factory.mktemp("stock")
    plan = make_plan(read_spec(write_spec(folder, method=STOCK, task={"target_modules": TARGETS})))
    return plan, run_plan(plan, "a test")


def plain_config(entry: dict[str, Any]) -> Any:
    """The config that a script would write."""
    kind = getattr(peft, entry["name"].removeprefix("peft."))
    given = {key: value for key, value in entry.items() if key not in ("name", "label", "learning_rate")}
    known = kind.__dataclass_fields__
    # A scale of 1 where AdaLoRA starts, as everywhere else.
    shared = {"r": 4, "lora_alpha": entry.get("init_r", 4), "total_step": 12}
    return kind(
        **({name: value for name, value in shared.items() if name in known} | given),
        target_modules=TARGETS,
        task_type="SEQ_CLS",
    )


class Allocate(TrainerCallback):
    """What PEFT's documentation of AdaLoRA asks for."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


def plain_losses(plan: Plan, entry: dict[str, Any], folder: Path) -> list[float]:
    """The losses of a script in stock PEFT, transformers and torch, which knows nothing of this package."""
    task = plan.spec.task
    assert isinstance(task, Classification)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(plan.spec.model)
    model: Any = AutoModelForSequenceClassification.from_pretrained(plan.spec.model, num_labels=3)
    if entry["name"] == "partial":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in ("query", "intermediate.dense", "classifier")))
    elif entry["name"] != "full":
        model = peft.get_peft_model(model, plain_config(entry))
    arguments = TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=12,
        logging_steps=1,
        seed=0,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    tokens = tokenizer(plan.splits.train["text"], truncation=True, max_length=16)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({**tokens, "labels": task.targets(plan.splits.train, plan.splits)}),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Allocate()] if "AdaLora" in entry["name"] else [],
    )
    if entry.get("init_lora_weights") == "eva":
        with torch.random.fork_rng():
            batches: Any = list(trainer.get_train_dataloader())
            texts = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
            peft.initialize_lora_eva_weights(model, texts, show_progress_bar=False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if "classifier" in name]
    own = [p for name, p in named if "classifier" not in name]
    groups = [{"params": own, "lr": entry.get("learning_rate", 2e-2)}, {"params": head, "lr": 2e-2}]
    trainer.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("entry", STOCK, ids=NAMES)
def test_the_loss_curve_is_that_of_a_plain_script(
    entry: dict[str, Any], stock: tuple[Plan, list[Result]], tmp_path: Path
) -> None:
    plan, results = stock
    label = entry.get("label", entry["name"])
    ours = [loss for _, loss in next(result for result in results if result.label == label).train_loss]
    assert len(ours) == 12
    assert ours == pytest.approx(plain_losses(plan, entry, tmp_path), abs=1e-5)


def test_eva_starts_every_linear_layer_that_of_the_pooler_too(write_spec: WriteSpec, tmp_path: Path) -> None:
    """The pooler gets the first token of each text, whose rows are not contiguous."""
    entry = {"name": "peft.LoraConfig", "init_lora_weights": "eva", "target_modules": "all-linear"}
    plan = make_plan(read_spec(write_spec(tmp_path, method=[entry], training={"steps": 1})))
    (result,) = run_plan(plan, "a test")
    assert "bert.pooler.dense" in result.ranks


def test_sizes_are_counted_the_same_way(stock: tuple[Plan, list[Result]]) -> None:
    """Two layers, width 32: the adapter's numbers without the head's 32 · 3 + 3."""
    _, results = stock
    by_label = {result.label: result for result in results}
    assert {result.head_parameters for result in results} == {99}
    assert by_label["peft.LoraConfig"].parameters["initial"] == 4 * 4 * 64
    assert by_label["DoRA"].parameters["initial"] == 4 * (4 * 64 + 32)
    adalora = by_label["AdaLoRA"]
    kept = sum(adalora.exported_ranks.values())
    assert (adalora.initial_mean_rank, kept <= 4 * 4) == (6, True)
    assert adalora.parameters == {"initial": 4 * 6 * 65, "final": kept * 65, "exported": kept * 64}
    assert by_label["partial"].parameters["initial"] == 2 * (32 * 32 + 32) + 2 * (32 * 64 + 64)
    assert by_label["full"].parameters["initial"] > by_label["partial"].parameters["initial"]
    assert by_label["full"].parameters == dict.fromkeys(
        ("initial", "final", "exported"), by_label["full"].parameters["final"]
    )


def test_plain_lora_has_ranks_and_spectra(stock: tuple[Plan, list[Result]]) -> None:
    plan, results = stock
    lora = next(result for result in results if result.label == "peft.LoraConfig")
    assert set(lora.ranks.values()) == {4}
    name = next(iter(lora.ranks))
    assert lora.export is not None
    model = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(plan.spec.model, num_labels=3),
        str(plan.spec.output / lora.export),
    )
    layer = model.get_submodule(f"base_model.model.{name}")
    dense = torch.linalg.svdvals(layer.get_delta_weight("default").double())[:4]
    assert lora.singular_values[name] == pytest.approx(dense.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"name": "peft.LoRAConfig"},
            r"`methods` must name a config class of PEFT \(the nearest .*LoraConfig",
        ),
        (
            {"name": "peft.LoraConfig", "use_dorra": True},
            r"`peft.LoraConfig.use_dorra` must be a field of PEFT's",
        ),
        (
            {"name": "peft.LoraConfig", "target_modules": ["no"]},
            r"`peft.LoraConfig` must be a config that fits .*no",
        ),
        ({"name": "peft.LoraConfig", "init_lora_weights": "nonsense"}, r"`peft.LoraConfig` must "),
        (
            {"name": "peft.AdaLoraConfig", "total_step": 3},
            r"`peft.AdaLoraConfig.total_step` must be left out, or",
        ),
        (
            {"name": "peft.LoraConfig", "init_lora_weights": "corda"},
            r"`peft.LoraConfig.init_lora_weights` must be a start that needs no function of yours .*; found 'corda'",
        ),
        ({"name": "peft.LoraConfig", "r": "eight"}, r"`peft.LoraConfig` must be a config that fits the model"),
        ({"name": "peft.LoraConfig", "rank_pattern": [1]}, r"`peft.LoraConfig` must be a config that fits the model"),
        ({"name": "peft.LoraConfig", "inference_mode": True}, r"`peft.LoraConfig.inference_mode` must be a field of"),
        ({"name": "peft.PromptLearningConfig"}, r"`methods` must name a config class of PEFT"),
        (
            {"name": "peft.LoraConfig", "init_lora_weights": "eva", "eva_config": {"rhoo": 1.0}},
            r"`peft.LoraConfig` must be a config that fits the model \(.*rhoo",
        ),
        ({"name": "full", "modules": ["query"]}, r"`full.modules` must be left out: full has no fields"),
        ({"name": "partial", "module": ["query"]}, r"`partial.module` must be `modules`, partial's only field"),
        ({"name": "partial", "modules": ["dropout"]}, r"`partial.modules` must match modules that have weights"),
        ({"name": "shrunk", "r": 4}, r"`shrunk.r` must be larger than budget.r, 4, to which it is cut; found 4"),
        ({"name": "partial"}, r"`partial.modules` must be a list of module names; found None"),
        ({"name": "partial", "modules": ["qeury"]}, r"`partial.modules` must match modules .*query.*; found 'qeury'"),
        (
            {"name": "pretrained"},
            r"`methods` must be a method that trains the head, since classification",
        ),
        (
            {"name": "DoRA"},
            r"`methods` must be written as a config of PEFT: .*\"peft.LoraConfig\" and use_dora = true; found 'DoRA'",
        ),
        ({"name": "LoraConfig"}, r"`methods` must name a config class of PEFT as peft.LoraConfig; found 'LoraConfig'"),
        (
            {"name": "lorra"},
            r"`methods` must be methods of rankwise, shrunk, full, partial, head, pretrained or a config class",
        ),
    ],
)
def test_mistakes_are_told_before_training(
    entry: dict[str, Any], message: str, write_spec: WriteSpec, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message) as raised:
        make_plan(read_spec(write_spec(tmp_path, method=[entry], task={"target_modules": TARGETS})))
    assert "\n" not in str(raised.value)


def test_classes_of_peft_get_the_budget_in_their_own_terms(write_spec: WriteSpec, tmp_path: Path) -> None:
    """AdaLoRA ends at the budget's rank, from 1.5 times as many; OFT's `r` is none."""
    entries = [{"name": "peft.AdaLoraConfig"}, {"name": "peft.OFTConfig", "oft_block_size": 8}]
    plan = make_plan(read_spec(write_spec(tmp_path, method=entries, task={"target_modules": TARGETS})))
    adalora, _ = [candidate_of(plan.spec, entry) for entry in plan.spec.entries]
    assert adalora.starting_scale == 1.0
    assert isinstance(adalora, StockCandidate)
    config = adalora.config(100)
    assert (config.init_r, config.target_r, config.lora_alpha) == (6, 4, 6)


def test_shrunk_is_the_best_cut_of_a_large_lora_to_the_size_of_the_budgets(
    write_spec: WriteSpec, tmp_path: Path
) -> None:
    entries = [{"name": "lora"}, {"name": "shrunk", "r": 8}]
    spec = read_spec(write_spec(tmp_path, method=entries, training={"steps": 6}, budget={"r": 2}))
    lora, shrunk = run_plan(make_plan(spec), "a test")
    assert shrunk.parameters["initial"] == 4 * lora.parameters["exported"]
    assert 0 < shrunk.parameters["exported"] <= lora.parameters["exported"]
    assert len(set(shrunk.ranks.values())) > 1, "ranks go where they lose least"
    # The export is what was scored, and each of its updates the truncated SVD of the large adapter's.
    assert shrunk.export is not None
    export = spec.output / shrunk.export
    assert evaluate_adapter(export, spec)["test"][shrunk.metric] == shrunk.score
    large = read_lora_of(spec.output / "adapters" / export.name)
    for name, update in read_lora(export).updates.items():
        U, S, Vh = torch.linalg.svd(large[name].double(), full_matrices=False)
        r = shrunk.ranks[name]
        best = (U[:, :r] * S[:r]) @ Vh[:r]
        assert torch.allclose(update.delta().double(), best, atol=1e-6)
        assert shrunk.singular_values[name][:r] == pytest.approx(S[:r].tolist(), abs=1e-6)


def read_lora_of(folder: Path) -> dict[str, torch.Tensor]:
    """B·A of each module of a saved adapter of rankwise's LoRA, whose scale is 1."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] in (None, config["r"])
    found: dict[str, torch.Tensor] = {}
    for key, A in tensors.items():
        name, own, part = key.removeprefix("base_model.model.").partition(".rankwise_tensors.")
        if own and part == "A":
            found[name] = tensors[key.removesuffix("A") + "B"] @ A
    return found
