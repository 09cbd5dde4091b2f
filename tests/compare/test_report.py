"""The table and the page: right numbers, every method, nothing from outside, nothing unescaped."""

from __future__ import annotations

import io
import json
import os
import re
import statistics
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rankwise.compare.notes import notes
from rankwise.compare.report import markdown, table, write_page
from rankwise.compare.results import Result
from rankwise.compare.summary import summarise
from rankwise.errors import ArgumentError, DataError

KINDS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "output.dense")
UNEVEN = {f"encoder.layer.{layer}.{kind}": 1 + layer + len(kind) % 3 for layer in range(3) for kind in KINDS}


def made(label: str = "lora", seed: int = 0, ranks: dict[str, int] | None = None, **changes: Any) -> Result:
    ranks = ranks or dict.fromkeys(UNEVEN, 8)
    content = {
        "format": 4,
        "method": "lora",
        "label": label,
        "seed": seed,
        "model": "tiny-encoder",
        "task": "classification",
        "learning_rate": 1e-3,
        "head_learning_rate": 2e-2,
        "steps": 60,
        "batch_size": 32,
        "fields": {"r": 8},
        "metric": "accuracy",
        "lower_is_better": False,
        "score": 0.8125 + 0.01 * seed,
        "validation_score": 0.8,
        "extra_metrics": {"macro_f1": 0.7},
        "train_loss": [[step, 3 / step] for step in range(1, 61)],
        "diverged": False,
        "gradient_norm": [[step, 2 / step] for step in range(1, 61)],
        "validation_curve": [],
        "scored_step": 60,
        "parameters": {"initial": 147456, "final": 120000, "exported": 131072},
        "head_parameters": 57750,
        "mean_rank": statistics.fmean(ranks.values()),
        "initial_mean_rank": 8.0,
        "starting_scale": 1.0,
        "ranks": ranks,
        "exported_ranks": ranks,
        "singular_values": {name: [2.0 * 0.5**index for index in range(rank)] + [0.0] for name, rank in ranks.items()},
        "seconds_per_step": 0.2,
        "seconds": 12.0,
        "steps_skipped": 0,
        "train_tokens": 64,
        "forgetting": None,
        "peak_memory": None,
        "data_digest": "0123456789ab",
        "git": None,
        "created": "2026-01-01T00:00:00+00:00",
        "export": "exports/lora",
        "versions": {"rankwise": "0.1.0", "torch": "2.13.0"},
        "machine": "x86_64, 2 cores",
        "command": "rankwise compare spec.toml",
    }
    return Result.model_validate_json(json.dumps(content | changes))


def page(tmp_path, results: list[Result], title: str = "A comparison") -> str:
    path = write_page(results, tmp_path / "report.html", title)
    assert path == tmp_path / "report.html"
    return path.read_text(encoding="utf-8")


def plain(results: list[Result], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(summarise(results), "accuracy"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_table_fits_80_columns_and_is_in_order():
    results = [made("lora", seed) for seed in range(3)]
    results += [made("deep-lora", seed, score=0.9, seconds_per_step=0.25) for seed in range(3)]
    lines = [line.split() for line in plain(results).splitlines()]
    first = lines.index(["deep-lora", "0.900", "0.900–0.900", "147,456", "120,000", "131,072", "8.0", "0.250", "1.25"])
    assert lines[first + 1] == ["lora", "0.823", "0.812–0.833", "147,456", "120,000", "131,072", "8.0", "0.200", "1.00"]


def test_markdown_has_a_row_per_method_and_no_spread_for_one_seed():
    text = markdown(summarise([made("lora"), made("a|b <i>", score=0.5)]), "accuracy")
    assert text == (
        "| method | accuracy | initial | final | exported | mean rank | s/step | × LoRA |\n"
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| lora | 0.812 | 147,456 | 120,000 | 131,072 | 8.0 | 0.200 | 1.00 |\n"
        "| a\\|b &lt;i&gt; | 0.500 | 147,456 | 120,000 | 131,072 | 8.0 | 0.200 | 1.00 |\n"
        "\n"
        "- learning rates not searched on this data, at others the order may differ: "
        "lora 0.001, a|b &lt;i&gt; 0.001\n"
        "- one seed: a first impression, not a ranking\n"
    )


def test_a_label_is_text_and_not_markup_in_the_terminal():
    assert "[bold]x" in plain([made("[bold]x")], width=120)


class Elements(HTMLParser):
    """Collects a page's elements, and checks that all are closed in order."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def elements(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser.seen


def test_the_page_is_whole_and_has_all_that_was_run(tmp_path):
    labels = ["lora", "adalora", "adalora lr=5e-4", "sora"]
    results = [made(label, seed, None if label == "lora" else UNEVEN) for label in labels for seed in range(3)]
    text = page(tmp_path, results)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    for label in labels:
        assert f'<th scope="row">{label}</th>' in text
        assert f"Kept ranks: {label}<" in text or label == "lora"
    assert "lora: all 15 modules keep rank 8" in text
    for fact in ("tiny-encoder", "rankwise compare spec.toml", "torch 2.13.0", "x86_64, 2 cores", "0, 1, 2", "57,750"):
        assert fact in text
    assert "sora against lora on 3 common seeds: median difference +0.000 (from +0.000 to +0.000)" in text
    assert "3 seeds: fewer than 5 show differences, and prove none" in text
    figures = [attributes for tag, attributes in elements(text) if tag == "svg"]
    assert len(figures) == 7
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)


def test_the_page_needs_nothing_from_outside(tmp_path):
    text = page(tmp_path, [made("lora"), made("sora", 0, UNEVEN)])
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?:[^\"'<\s]*", text)) == namespaces
    names = {tag for tag, _ in elements(text)}
    assert not names & {"script", "link", "img", "iframe", "image"}
    assert "@import" not in text
    ids = Counter(attributes["id"] for _, attributes in elements(text) if "id" in attributes)
    assert max(ids.values()) == 1
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_no_text_of_a_result_becomes_markup(tmp_path):
    attack = "</title><script>alert('x')</script>\x07 $a$ & \"b\""
    texts = dict.fromkeys(("model", "task", "machine", "command"), attack)
    ranks = {f"{attack}.{layer}.query": 1 + layer for layer in range(3)}
    text = page(tmp_path, [made(attack, 0, ranks, **texts, versions={attack: attack}), made("lora", **texts)], attack)
    assert "<script" not in text
    assert "\x07" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;  $a$" in text
    assert "script" not in {tag for tag, _ in elements(text)}


def test_the_figures_are_of_the_run_with_the_lower_median_score(tmp_path):
    ranks = [{"layer.0.query": 10 * seed + 11, "layer.1.query": 10 * seed + 12} for seed in range(4)]
    text = page(
        tmp_path, [made("sora", seed, ranks[seed], score=score) for seed, score in enumerate([0.9, 0.2, 0.8, 0.1])]
    )
    cells = {int(cell) for cell in re.findall(r">(\d\d)</text>", text)}
    assert {21, 22} <= cells
    assert not {31, 32, 41, 42} & cells


def test_modules_are_placed_by_the_first_integer_of_their_path(tmp_path):
    stacks = {f"{stack}.block.{layer}.layer.0.q": 1 + layer for stack in ("encoder", "decoder") for layer in range(2)}
    text = page(tmp_path, [made("sora", 0, {**stacks, "pooler.dense": 7})])
    for kind in ("encoder.block.*.layer.0.q", "decoder.block.*.layer.0.q", "pooler.dense"):
        assert f">{kind}</text>" in text
    assert ">-</text>" in text


def test_runs_that_learned_nothing_still_make_a_page(tmp_path):
    nothing = {"parameters": {"initial": 8, "final": 0, "exported": 0}, "train_loss": [], "steps_skipped": 4}
    text = page(tmp_path, [made("sora", 0, {"layer.0.query": 0, "layer.1.query": 0}, **nothing)])
    assert "sora exports no parameters and is not drawn." in text
    assert "sora: all 2 modules keep rank 0." in text
    assert "no update" in text
    assert "sora: steps skipped over all seeds: 4" in text


def test_the_page_stays_small_for_nine_methods_and_three_seeds(tmp_path):
    ranks = {
        f"encoder.layer.{layer}.{kind}": 1 + layer for layer in range(12) for kind in (*KINDS, "intermediate.dense")
    }
    text = page(tmp_path, [made(f"method-{number}", seed, ranks) for number in range(9) for seed in range(3)])
    assert len(text.encode()) < 2_000_000
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)


def test_the_same_results_give_the_same_page(tmp_path):
    results = [made("lora"), made("sora", 0, UNEVEN)]
    assert page(tmp_path, results) == page(tmp_path, results[::-1])


def test_an_interrupted_page_leaves_nothing(tmp_path, monkeypatch):
    def crash(source, target):
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk gone"):
        write_page([made()], tmp_path / "report.html", "A comparison")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("results", "sentence"),
    [([], "no finished runs"), ([made("lora"), made("sora", task="regression")], "classification, regression")],
)
def test_what_is_no_comparison_is_refused(tmp_path, results, sentence):
    with pytest.raises(DataError, match=sentence):
        write_page(results, tmp_path / "report.html", "A comparison")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_mean_nothing_are_named():
    flat = [[step, 2.0] for step in range(1, 61)]
    head: dict[str, Any] = {
        "parameters": {"initial": 0, "final": 0, "exported": 0},
        "mean_rank": None,
        "method": "head",
    }
    results = [
        made("head", score=0.5, starting_scale=None, **head),
        made("lora", score=0.6),
        made("sora", score=0.5, validation_curve=[[30, 0.4], [60, 0.5]]),
        made("nnm", score=0.7, train_loss=flat),
    ]
    rows = summarise(results)
    said = notes(rows)
    assert said == [
        "sora is not better than the floor, the head alone on the frozen model: its adapter has added nothing",
        "nnm has not learnt anything at this rate (0.001): its loss did not fall",
        "sora was still improving on the validation split when it ended: more steps may help",
        "learning rates not searched on this data, at others the order may differ: nnm 0.001, lora 0.001, sora 0.001",
        "one seed: a first impression, not a ranking",
    ]
    text = markdown(rows, "accuracy")
    assert "| head (floor) | 0.500 | – | – | – | – | 0.200 | 1.00 |" in text
    assert all(f"- {note}\n" in text for note in said)


def test_the_page_names_the_floor_and_draws_it(tmp_path):
    head: dict[str, Any] = {
        "parameters": {"initial": 0, "final": 0, "exported": 0},
        "mean_rank": None,
        "method": "head",
    }
    nothing: dict[str, Any] = {"ranks": {}, "exported_ranks": {}, "singular_values": {}, "starting_scale": None}
    text = page(tmp_path, [made("head", score=0.5, **head | nothing), made("lora", score=0.5)])
    assert "lora is not better than the floor" in text
    assert text.count("The dashed line is the floor, 0.500: the head alone on the frozen model.") >= 2
    assert "head: it adapts no module" not in text
    assert "<dt>Learning rate of the task head</dt><dd>0.02</dd>" in text


def test_exported_ranks_have_a_figure_where_they_differ(tmp_path):
    exported = {name: 1 + place % 3 for place, name in enumerate(UNEVEN)}
    text = page(tmp_path, [made("deep", exported_ranks=exported), made("lora")])
    assert "Exported ranks: deep<" in text
    assert "Exported ranks: lora<" not in text
    row = markdown(summarise([made("deep", exported_ranks=exported)]), "accuracy")
    assert "| 8.0 → 2.0 |" in row


def test_the_search_of_rates_is_drawn_and_its_edge_told(tmp_path: Path) -> None:
    scores = {1e-4: 0.7, 1e-3: 0.8, 1e-2: 0.9}
    runs = [made("lora", learning_rate=rate, validation_score=score) for rate, score in scores.items()]
    text = write_page(runs, tmp_path / "report.html", "A comparison").read_text()
    assert "Score by learning rate" in text
    assert "lora was best at 0.01, the edge of its list of learning rates" in text
    assert "not searched on this data" not in text
    alone = write_page(runs[:1], tmp_path / "alone.html", "A comparison").read_text()
    assert "Score by learning rate" not in alone


def told(label: str, scores: list[float], **changes: Any) -> str:
    """What is said of a label against LoRA at 0.5 on as many seeds."""
    runs = [made("lora", seed, score=0.5, **changes) for seed in range(len(scores))]
    runs += [made(label, seed, score=score, **changes) for seed, score in enumerate(scores)]
    return next(note for note in notes(summarise(runs)) if "against" in note)


def test_a_difference_is_judged_by_its_interval() -> None:
    above, mixed = [0.6, 0.61, 0.62, 0.63, 0.64], [0.4, 0.6, 0.45, 0.61, 0.5]
    assert told("sora", above).endswith(
        "median difference +0.120 (95 % interval +0.100 to +0.140), better on 5, Wilcoxon p = 0.062: better here"
    )
    assert told("sora", mixed).endswith("better on 2, Wilcoxon p = 0.75: not told apart")
    loss: dict[str, Any] = {"metric": "loss", "lower_is_better": True}
    assert told("sora", above, **loss).endswith("better on 0, Wilcoxon p = 0.062: worse here")
    assert told("sora", above[:4]).endswith("better on 4"), "four seeds prove nothing, whatever they say"


def test_another_reference_can_be_named() -> None:
    runs = [made(label, seed, score=score) for label, score in (("dora", 0.5), ("nnm", 0.6)) for seed in range(3)]
    rows = summarise(runs, "dora")
    assert "| × dora |" in markdown(rows, "accuracy")
    assert any(note.startswith("nnm against dora on 3 common seeds: median difference +0.100") for note in notes(rows))
    assert "nothing was run to compare with" in " ".join(notes(summarise(runs)))
    with pytest.raises(ArgumentError, match=r"`reference` must be the label .* found 'lora'"):
        summarise(runs, "lora")


def test_the_ceiling_is_named_and_drawn(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"ranks": {}, "exported_ranks": {}, "singular_values": {}, "starting_scale": None}
    full = made("full", score=0.9, method="full", mean_rank=None, **nothing)
    text = page(tmp_path, [made("lora", score=0.7), full])
    assert ">full (ceiling)</th>" in text
    assert text.count("The line of dashes and dots is the ceiling, 0.900: every weight trained.") >= 2
    assert "full: it adapts no module" not in text


def test_forgetting_has_a_column_where_it_was_measured() -> None:
    assert "forgetting" not in markdown(summarise([made("lora")]), "accuracy")
    text = markdown(summarise([made("lora", forgetting=0.25), made("sora")]), "accuracy")
    assert "| × LoRA | forgetting |" in text
    assert "| 1.00 | +0.250 |" in text
