"""The page of an inspection: its files, its sentences, and what it needs from outside (nothing)."""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import rankwise
from conftest import tiny_bert
from rankwise.cli.main import app
from rankwise.errors import DataError
from rankwise.inspection.answer import QUESTIONS
from rankwise.inspection.figures import answers_of
from rankwise.inspection.found import read_adapter
from rankwise.inspection.history import read_history
from rankwise.inspection.over_time import answers_over_time
from rankwise.inspection.page import write_inspection

SPECTRA = {
    "encoder.layer.0.attention.query": [4.0, 2.0, 1.0],
    "encoder.layer.1.attention.query": [8.0, 0.01, 0.01],
    "encoder.layer.0.output": [0.0, 0.0, 0.0],
    "encoder.layer.1.output": [2.0, 2.0, 2.0],
}


def written_lora(folder: Path, spectra: dict[str, list[float]], seed: int = 0) -> Path:
    """A plain LoRA whose updates have these singular values."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, values in spectra.items():
        U, V = (torch.linalg.qr(torch.randn(d, len(values), generator=generator)).Q for d in (20, 16))
        tensors[f"base_model.model.{name}.lora_B.weight"] = (U * torch.tensor(values)).contiguous()
        tensors[f"base_model.model.{name}.lora_A.weight"] = V.T.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["query", "output"]}'
    )
    return folder


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("inspected")
    adapter, other = written_lora(tmp_path / "mine", SPECTRA), written_lora(tmp_path / "other", SPECTRA, seed=1)
    found = read_adapter(adapter)
    return write_inspection([found], tmp_path / "page", against=read_adapter(other))


def test_every_figure_has_its_files_and_they_are_whole(page: Path) -> None:
    figures = [file.stem for file in page.parent.glob("*.svg")]
    assert {"singular-values", "update-norms", "kept-ranks", "effective-ranks", "energy"} <= set(figures)
    assert {"against-cosine", "against-alignment"} <= set(figures)
    for name in figures:
        ET.parse(page.parent / f"{name}.svg")
        with Image.open(page.parent / f"{name}.png") as image:
            image.verify()
        with (page.parent / f"{name}.csv").open(newline="") as file:
            columns, *rows = list(csv.reader(file))
        assert rows
        assert {len(row) for row in rows} == {len(columns)}
    with (page.parent / "singular-values.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    for name, values in SPECTRA.items():
        if values[0]:
            told = [float(row["singular_value"]) for row in read if row["module"] == name]
            assert told == pytest.approx(values, rel=1e-5)


def test_the_page_asks_a_readers_questions_in_order(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    asked = [question for question in QUESTIONS if f">{question}</h2>" in text]
    assert asked == list(QUESTIONS[:6])
    assert [text.index(f">{question}</h2>") for question in asked] == sorted(
        text.index(f">{question}</h2>") for question in asked
    )
    assert len(re.findall(r"<figcaption>[^<]{20,}", text)) == len(list(page.parent.glob("*.svg")))


def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8")).found
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        for name in ("href", "src", "xlink:href", "srcset"):
            target = attributes.get(name)
            if target is None:
                continue
            is_anchor = target.startswith("#")
            is_beside = tag == "a" and (page.parent / target).is_file()
            assert is_anchor or is_beside, (tag, target)
    assert "url(http" not in page.read_text()
    assert "@import" not in page.read_text()


def test_the_page_can_be_used_without_seeing_it(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8")).found
    drawings = [attributes for tag, attributes in elements if tag == "svg"]
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in drawings)
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in elements:
        target = attributes.get("href") or ""
        if tag == "a" and target.startswith("#"):
            assert target[1:] in ids
    assert ("html", {"lang": "en"}) in elements
    # A table that is wider than the window is scrolled by keyboard.
    wide = [attributes for _, attributes in elements if attributes.get("class") == "wide"]
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in wide)
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_light_dark_and_print_have_their_rules(page: Path) -> None:
    text = page.read_text()
    assert "color-scheme: light dark" in text
    assert "@media (prefers-color-scheme: dark)" in text
    assert "@media print" in text


def test_the_same_adapter_gives_the_same_page(page: Path, tmp_path: Path) -> None:
    folder = page.parent.parent
    found, other = read_adapter(folder / "mine"), read_adapter(folder / "other")
    again = write_inspection([found], tmp_path / "again", against=other)
    assert again.read_text() == page.read_text()


def test_sentences_are_of_this_adapter(tmp_path: Path) -> None:
    found = read_adapter(written_lora(tmp_path / "mine", SPECTRA))
    told = {answer.name: answer.plot.caption for answer in answers_of(found)}
    assert told["singular-values"].startswith(
        "3 of 4 modules changed; the longest direction is in encoder.layer.1.attention.query (σ₁ = 8)"
    )
    # The energies are 21, 64.0002, 0 and 12.
    assert "1 module of 4, a tenth of them, hold 66 %" in told["update-norms"]
    # A rank of zeros is not kept in a plain LoRA.
    assert told["kept-ranks"].startswith("9 of the 12 ranks in the tensors are kept (75 %)")
    assert "the ranks run from 0 (encoder.layer.0.output) to 3 (encoder.layer.0.attention.query)" in told["kept-ranks"]
    # 90 %: 2 + 1 + 3 ranks. 99 %: 3 + 1 + 3.
    assert told["energy"].startswith("6 of 9 ranks keep 90 % of each module's energy, 7 keep 99 % and 7 keep 99.9 %")
    assert "1 module could go altogether" in told["energy"]
    assert told["distance"].startswith("Not measured: give the base model (`--base`)")


def test_an_adapter_that_changed_nothing_is_told_so(tmp_path: Path) -> None:
    nothing = {name: [0.0, 0.0, 0.0] for name in SPECTRA}
    found = read_adapter(written_lora(tmp_path / "mine", nothing))
    told = {answer.name: answer.plot.caption for answer in answers_of(found)}
    assert told["singular-values"] == "No module has changed: all 4 updates are zero."
    assert told["energy"].startswith("The whole adapter could be dropped")
    write_inspection([found], tmp_path / "page")


def test_an_adapter_against_itself_and_against_a_stranger(tmp_path: Path) -> None:
    mine = read_adapter(written_lora(tmp_path / "mine", SPECTRA))
    page = write_inspection([mine], tmp_path / "page", against=mine)
    with (page.parent / "against-cosine.csv").open(newline="") as file:
        cosines = {row["module"]: float(row["cosine"]) for row in csv.DictReader(file)}
    assert cosines == pytest.approx({name: float(values[0] > 0) for name, values in SPECTRA.items()}, abs=1e-6)
    stranger = read_adapter(written_lora(tmp_path / "stranger", {"other.query": [1.0, 1.0, 1.0]}))
    with pytest.raises(DataError, match="adapt no module in common"):
        write_inspection([mine], tmp_path / "none", against=stranger)
    assert not (tmp_path / "none").exists()


def test_no_name_becomes_markup(tmp_path: Path) -> None:
    folder = written_lora(tmp_path / "<b>&mine", SPECTRA)
    text = write_inspection([read_adapter(folder)], tmp_path / "page").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;mine" in text


def test_names_without_layers_make_no_endless_figure(tmp_path: Path) -> None:
    """As those of kohya's scripts, whose underscores do not part numbers from words: each module is a row."""
    spectra = {f"unet_blocks_{i}_attn": [1.0 + i, 0.5, 0.1] for i in range(100)}
    page = write_inspection([read_adapter(written_lora(tmp_path / "mine", spectra))], tmp_path / "page")
    svg = (page.parent / "update-norms.svg").read_text()
    assert "48 of 100 rows, those with the largest numbers" in svg
    assert "unet_blocks_99_attn" in svg
    assert "unet_blocks_3_attn" not in svg
    assert "unet_blocks_3_attn" in (page.parent / "update-norms.csv").read_text()


# --- over time -------------------------------------------------------------------------------------------------------


def test_checkpoints_and_records_tell_the_same_story(tmp_path: Path) -> None:
    """A run is recorded as it goes, and its checkpoints are read afterwards."""
    tiny_bert().save_pretrained(tmp_path / "base")
    base = type(tiny_bert()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, rankwise.SoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    recorder = rankwise.Recorder(model, tmp_path / "records", pretrained=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    ids = torch.arange(24).view(4, 6)
    for step in range(1, 7):
        model(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            recorder.record(step)
            model.save_pretrained(str(tmp_path / "run" / f"checkpoint-{step}"))
    (tmp_path / "run" / "checkpoint-8").mkdir()  # killed before it wrote anything
    recorded, reread = read_history(tmp_path / "records"), read_history(tmp_path / "run")
    assert [each.record.step for each in recorded] == [each.record.step for each in reread] == [2, 4, 6]
    for one, other in zip(recorded, reread, strict=True):
        for name, layer in one.record.modules.items():
            again = other.record.modules[name]
            held = len(again.singular_values)  # closed gates are gone from what was reread
            assert again.singular_values == pytest.approx(layer.singular_values[:held], rel=1e-6)
            assert (again.kept, again.gates) == (layer.kept, pytest.approx(layer.gates))
    told = {answer.name: answer.plot.caption for answer in answers_over_time(recorded)}
    assert {"ranks-over-time", "alignment-over-time", "gates-over-time", "drift-over-time"} <= told.keys()
    kept = sum(layer.kept for layer in recorded[-1].record.modules.values())
    assert (
        f"the kept ranks went from {sum(x.kept for x in recorded[0].record.modules.values())} to {kept}"
        in (told["ranks-over-time"])
    )
    arguments = ["inspect", str(tmp_path / "run" / "checkpoint-6"), "--checkpoints", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*arguments, "--base", str(tmp_path / "base")])
    assert done.exit_code == 0, done.output
    page = tmp_path / "run" / "checkpoint-6-inspected" / "index.html"
    text = page.read_text()
    for question in (QUESTIONS[4], QUESTIONS[6]):
        assert f">{question}</h2>" in text
    assert (page.parent / "lengths.csv").is_file()
    assert (page.parent / "ranks-over-time.csv").is_file()


def test_a_folder_without_history_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither records"):
        read_history(tmp_path)
