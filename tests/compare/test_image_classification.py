"""Images in `train` and `compare`: a tiny ViT learns colours, and scores are those of stock PEFT."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTModel, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from rankwise.compare.plan import make_plan
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import parse_spec
from rankwise.errors import ArgumentError, DataError

COLOURS = {"blue": (60, 60, 160), "green": (60, 160, 60), "red": (160, 60, 60)}
TARGETS = ["q_proj", "v_proj"]


def picture(label: str, seed: int) -> Image.Image:
    """Sixteen by sixteen pixels about a colour."""
    noise = np.random.default_rng(seed).integers(-60, 60, (16, 16, 3))
    return Image.fromarray((np.asarray(COLOURS[label]) + noise).clip(0, 255).astype(np.uint8))


def rows(split: str, count: int) -> list[tuple[str, str, int]]:
    """The file, the label and the seed of each picture."""
    labels = list(COLOURS)
    start = 0 if split == "train" else 1000
    return [(f"pictures/{split}-{i}.png", labels[i % 3], start + i) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with its processor (model), pictures, and tables that name them (train.csv and test.csv)."""
    place = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(config).save_pretrained(place / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(place / "model")
    (place / "pictures").mkdir()
    for split, count in (("train", 60), ("test", 30)):
        with (place / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "colour"])
            for name, label, seed in rows(split, count):
                picture(label, seed).save(place / name)
                writer.writerow([name, label])
    return place


def table(folder: Path, **changes: Any) -> dict[str, Any]:
    """A SPEC over the pictures."""
    whole: dict[str, Any] = {
        "model": str(folder / "model"),
        "output": "out",
        "data": {
            "train": str(folder / "train.csv"),
            "test": str(folder / "test.csv"),
            "image": "file",
            "label": "colour",
        },
        "task": {"type": "image_classification"},
        "training": {"steps": 12, "batch_size": 12, "learning_rate": 1e-2, "head_learning_rate": 1e-2, "warmup": 0.0},
        "budget": {"r": 4},
        "methods": ["lora"],
    }
    for key, value in changes.items():
        whole[key] = whole.get(key, {}) | value if isinstance(value, dict) else value
    return whole


def pixels(split: str, count: int) -> torch.Tensor:
    """What the model reads: every channel from −1 to 1."""
    arrays = [np.asarray(picture(label, seed), dtype=np.float32) for _, label, seed in rows(split, count)]
    return torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2) / 127.5 - 1)


def test_colours_are_learnt_and_scored_as_stock_peft_scores_them(folder: Path, tmp_path: Path) -> None:
    methods = ["lora", "adalora"]
    plan = make_plan(parse_spec(table(folder, methods=methods), tmp_path).with_floor())
    results = {result.method: result for result in run_plan(plan, "a test")}
    assert set(results) == {*methods, "head"}
    truth = np.asarray([list(COLOURS).index(label) for _, label, _ in rows("test", 30)])
    for result in results.values():
        assert (result.task, result.metric, set(result.extra_metrics)) == (
            "image_classification",
            "accuracy",
            {"macro_f1"},
        )
        assert result.head_parameters == 32 * 3 + 3
    assert results["lora"].score > 0.8
    for method in methods:
        export = results[method].export
        assert export is not None
        base = ViTForImageClassification.from_pretrained(plan.spec.model, num_labels=3)
        model = PeftModel.from_pretrained(base, str(plan.spec.output / export)).eval()
        with torch.no_grad():
            guess = model(pixel_values=pixels("test", 30)).logits.argmax(-1).numpy()
        assert results[method].score == pytest.approx(float((guess == truth).mean()))


def test_the_loss_curve_is_that_of_a_plain_script(folder: Path, tmp_path: Path) -> None:
    """Trainer with stock PEFT's LoRA as PEFT's example of image classification has it."""
    changes = {"methods": ["peft.LoraConfig"], "task": {"target_modules": TARGETS}}
    plan = make_plan(parse_spec(table(folder, **changes), tmp_path))
    (result,) = run_plan(plan, "a test")
    set_seed(0)
    base = ViTForImageClassification.from_pretrained(plan.spec.model, num_labels=3)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, modules_to_save=["classifier"])
    arguments = TrainingArguments(
        str(tmp_path / "plain"),
        max_steps=12,
        per_device_train_batch_size=12,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    seeds_of_training = {path.name: i for i, path in enumerate(plan.splits.train["image"])}
    assert len(seeds_of_training) == 54
    data = pixels("train", 60)
    kept = [int(name.removeprefix("train-").removesuffix(".png")) for name in seeds_of_training]
    dataset = [{"pixel_values": data[i], "labels": i % 3} for i in kept]
    trainer = Trainer(peft.get_peft_model(base, config), arguments, train_dataset=dataset)  # type: ignore[arg-type]
    trainer.train()
    theirs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [loss for _, loss in result.train_loss] == pytest.approx(theirs, abs=1e-5)


def test_another_picture_makes_another_run_and_another_folder_does_not(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (first,) = make_plan(parse_spec(table(folder), tmp_path)).runs
    (same,) = make_plan(parse_spec(table(tmp_path / "copy"), tmp_path)).runs
    assert same.key == first.key
    picture("red", 99).save(tmp_path / "copy" / "pictures" / "train-0.png")
    (other,) = make_plan(parse_spec(table(tmp_path / "copy"), tmp_path)).runs
    assert other.key != first.key


def test_a_hub_data_set_holds_images_themselves(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures give the same losses."""
    found = datasets.DatasetDict()
    for split, count in (("train", 60), ("test", 30)):
        columns = {
            "file": [str(folder / name) for name, _, _ in rows(split, count)],
            "colour": [label for _, label, _ in rows(split, count)],
        }
        found[split] = datasets.Dataset.from_dict(columns).cast_column("file", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"some/set": found}[name])
    hub = {"data": {"dataset": "some/set", "image": "file", "label": "colour"}}
    runs = []
    for name, changes in (("files", {}), ("hub", hub)):
        spec = table(folder, output=name, training={"steps": 2}) | changes
        runs += run_plan(make_plan(parse_spec(spec, tmp_path)), "a test")
    assert runs[0].train_loss == runs[1].train_loss


def test_a_model_without_an_image_processor(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("preprocessor*"))
    with pytest.raises(ArgumentError, match=r"^`model` must be .* with an image processor that pillow is enough for;"):
        make_plan(parse_spec(table(folder, model="model"), tmp_path))


def test_a_model_whose_head_has_another_name(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    config = {"model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ArgumentError, match=r"^`model` must have a head among classifier; found \['deit', 'cls_classif"
    ):
        make_plan(parse_spec(table(folder, model="model"), tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,colour\nnowhere.png,red\n", r"odd.csv names an image in row 1 that is missing: 'nowhere.png'$"),
        ("file,colour\nodd.csv,red\n", r"odd.csv names an image in row 1 that pillow cannot read: 'odd.csv'$"),
        ("file,colour\ncut.png,red\n", r"odd.csv names an image in row 1 that pillow cannot read: 'cut.png'$"),
        ("picture,colour\ncut.png,red\n", r"odd.csv has no column 'file', as `data.image` asks: the nearest"),
        ("file,colour\nred.png,violet\n", r"odd.csv has the label 'violet', which .*train.csv never shows$"),
    ],
)
def test_tables_that_name_no_images(content: str, message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_text(content)
    picture("red", 0).save(tmp_path / "red.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:300])
    with pytest.raises(DataError, match=message) as raised:
        make_plan(parse_spec(table(folder, data={"test": str(tmp_path / "odd.csv")}), tmp_path))
    assert "\n" not in str(raised.value)


def test_keys_of_texts_are_unknown(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`task.max_length` must be a known key"):
        parse_spec(table(folder, task={"max_length": 8}), tmp_path)
