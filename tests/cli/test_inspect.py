"""What `rankwise inspect` says of a folder is what the model that was saved there has; its page is tested elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

import rankwise
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.cli.main import app
from rankwise.cli.output import by_kind
from rankwise.errors import AdapterFileError, ArgumentError
from rankwise.spectral import effective_rank, energy_rank

IDS = torch.arange(24).view(4, 6)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else here."""
    monkeypatch.setattr("rankwise.inspection.page.write_inspection", lambda found, out, **_: out / "index.html")


def adapted(base: Path, config: Any) -> PeftModel:
    model: Any = BertForSequenceClassification.from_pretrained(base)
    return get_peft_model(model, config)


def inspect(*arguments: str | Path) -> Any:
    runner = CliRunner(env={"COLUMNS": "250", "TERM": "dumb", "NO_COLOR": "1"})
    return runner.invoke(app, ["inspect", *map(str, arguments)])


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the table's rows by their first."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("method", CONFIGS)
def test_every_module_as_the_live_model_has_it(method: str, base: Path, tmp_path: Path) -> None:
    config = CONFIGS[method](r=2, target_modules="all-linear", task_type="SEQ_CLS", init_weights=False)
    model = adapted(base, config)
    model.save_pretrained(str(tmp_path / "saved"))
    done = inspect(tmp_path / "saved", "--all", "--energy", "0.9")
    assert done.exit_code == 0, done.output
    found, updates, kept = rows(done.stdout), rankwise.factors(model), rankwise.ranks(model)
    assert found.keys() == updates.keys()
    for name, f in updates.items():
        dense = torch.linalg.svdvals(f.delta().double())
        measures = [f"{float(effective_rank(dense)):.1f}", str(int(energy_rank(dense, 0.9)))]
        assert found[name] == ["1", str(f.r), str(kept[name]), f"{float(dense.norm()):.3g}", *measures]
    held = sum(f.r for f in updates.values())
    exported = rankwise.export_lora(model, tmp_path / "lora", layout="compact").ranks
    told = f"{sum(kept.values())} kept; tensors hold {held}, an export {sum(exported.values())}"
    assert f"ranks    {told}\n" in done.stdout
    assert f"adapter  {method} on BertForSequenceClassification\n" in done.stdout
    assert "trained  no step yet\n" in done.stdout


def test_an_update_of_rounding_has_rank_0(base: Path, tmp_path: Path) -> None:
    adapted(base, rankwise.SorsaConfig(r=3, target_modules=["query"])).save_pretrained(str(tmp_path / "saved"))
    done = inspect(tmp_path / "saved")
    (cells,) = rows(done.stdout).values()
    assert cells == ["2", "6", "3", "0", "0.0", "0"]
    assert "ranks    6 kept; tensors hold 12, an export 0\n" in done.stdout


def test_modules_that_differ_in_their_layers_number_share_a_row(base: Path, tmp_path: Path) -> None:
    second = "layer.1.attention.self.query"
    patterns = {"rank_pattern": {second: 5}, "alpha_pattern": {second: 20}}
    config = rankwise.LoraConfig(r=3, target_modules=["query"], init_weights=False, **patterns)
    model = adapted(base, config)
    model.save_pretrained(str(tmp_path / "saved"))
    (row,) = rows(inspect(tmp_path / "saved").stdout).items()
    norms = sorted(float(f.delta().norm()) for f in rankwise.factors(model).values())
    assert row[0] == "bert.encoder.layer.*.attention.self.query"
    assert row[1][:4] == ["2", "3–5", "3–5", "–".join(f"{norm:.3g}" for norm in norms)]


def test_a_lora_of_pefts(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"], init_lora_weights=False)
    model = adapted(base, config)
    model.save_pretrained(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if "lora_B" in key]:
        tensors[key][:, 1:] = 0
    save_file(tensors, file, {"format": "pt"})
    done = inspect(tmp_path / "saved")
    (cells,) = rows(done.stdout).values()
    assert cells[:3] == ["2", "4", "1"]
    assert cells[4:] == ["1.0", "1"]
    assert "ranks    2 kept; tensors hold 8, an export 2\n" in done.stdout
    assert "adapter  a plain LoRA\n" in done.stdout
    assert "trained  a plain LoRA does not say how far\n" in done.stdout


def test_a_run_that_stopped_before_its_ranks_were_final_is_told(base: Path, tmp_path: Path) -> None:
    config = rankwise.AdaLoraConfig(r=2, target_modules=["query"], total_step=20, tinit=2, tfinal=4)
    model = adapted(base, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS[:, 0] % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="would have become final at step 16"):
        model.save_pretrained(str(tmp_path / "saved"))
    done = inspect(tmp_path / "saved")
    assert done.exit_code == 0
    assert "trained  to step 3 of 20\n" in done.stdout
    assert "would have become final at step 16" in done.stderr


@pytest.mark.parametrize("energy", ["-1", "1.5", "nan"])
def test_an_impossible_share_is_refused(energy: str, base: Path) -> None:
    error = inspect(base, "--energy", energy).exception
    assert isinstance(error, ArgumentError)
    assert "--energy" in str(error)
    assert energy in str(error)


@pytest.mark.parametrize("folder", ["base", "nowhere"])
def test_a_folder_without_an_adapter_is_refused(folder: str, base: Path) -> None:
    error = inspect(base.parent / folder).exception
    assert isinstance(error, AdapterFileError)
    assert str(error) == f"{base.parent / folder} holds no LoRA adapter: adapter_config.json is missing"


def test_a_base_model_that_does_not_open_is_named_and_can_be_given(base: Path, tmp_path: Path) -> None:
    adapted(base, rankwise.LoraConfig(r=2, target_modules=["query"])).save_pretrained(str(tmp_path / "saved"))
    elsewhere = base.rename(tmp_path / "elsewhere")
    error = inspect(tmp_path / "saved").exception
    assert isinstance(error, AdapterFileError)
    assert str(base) in str(error)
    assert inspect(tmp_path / "saved", "--base", elsewhere).exit_code == 0


def test_numbers_are_whole_on_a_narrow_terminal(base: Path, tmp_path: Path) -> None:
    config = rankwise.LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS", init_weights=False)
    adapted(base, config).save_pretrained(str(tmp_path / "saved"))
    arguments = ["inspect", str(tmp_path / "saved")]
    done = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, arguments)
    assert "…" not in done.stdout
    lines = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    assert len([cells for cells in lines if cells[2].strip().isdigit()]) == 7


def test_names_break_at_dots_alone(base: Path, tmp_path: Path) -> None:
    config = rankwise.LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS", init_weights=False)
    adapted(base, config).save_pretrained(str(tmp_path / "saved"))
    for columns in (80, 100, 250):
        runner = CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"})
        done = runner.invoke(app, ["inspect", str(tmp_path / "saved"), "--all"])
        assert max(map(len, done.stdout.splitlines()[:-5])) <= columns
        cells = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")]
        # A line that does not end in a dot ends a name.
        names = "".join(cell if cell.endswith(".") else f"{cell}\n" for cell in cells).splitlines()
        assert names == list(by_kind(rankwise.factors(adapted(base, config)), every=True))


def test_several_adapters_each_have_a_table(base: Path, tmp_path: Path) -> None:
    for name, r in (("one", 2), ("two", 3)):
        adapted(base, rankwise.LoraConfig(r=r, target_modules=["query"])).save_pretrained(str(tmp_path / name))
    done = inspect(tmp_path / "one", tmp_path / "two")
    assert done.exit_code == 0, done.output
    assert f"folder   {tmp_path / 'one'}\n" in done.stdout
    assert "ranks    4 kept; tensors hold 4, an export 0\n" in done.stdout
    assert f"folder   {tmp_path / 'two'}\n" in done.stdout
    assert "ranks    6 kept; tensors hold 6, an export 0\n" in done.stdout
    assert done.stdout.endswith(f"page     {tmp_path / 'one-inspected' / 'index.html'}\n")


def test_a_folder_of_something_else_is_not_replaced_unasked(base: Path, tmp_path: Path) -> None:
    adapted(base, rankwise.LoraConfig(r=2, target_modules=["query"])).save_pretrained(str(tmp_path / "saved"))
    error = inspect(tmp_path / "saved", "--out", base).exception
    assert isinstance(error, ArgumentError)
    assert str(error).startswith("`--out` must be new or hold an earlier inspection")
    assert inspect(tmp_path / "saved", "--out", base, "--force").exit_code == 0


def test_nan_is_named(base: Path, tmp_path: Path) -> None:
    adapted(base, rankwise.LoraConfig(r=2, target_modules=["query"])).save_pretrained(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(".A"))
    tensors[key][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    error = inspect(tmp_path / "saved").exception
    assert isinstance(error, AdapterFileError)
    assert "NaN" in str(error)
    assert "layer.0.attention.self.query" in str(error)
