"""Result files: whole or absent, read back as written; and the row that many runs make."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from rankwise.compare.results import Result, read_results, schema, write_result
from rankwise.compare.summary import best_rates, rate_curves, summarise
from rankwise.errors import DataError


def made(label: str = "lora", seed: int = 0, **changes: Any) -> Result:
    result = Result(
        method=label.split()[0],
        label=label,
        seed=seed,
        model="tiny-encoder",
        task="classification",
        learning_rate=1e-3,
        head_learning_rate=1e-2,
        steps=4,
        batch_size=2,
        fields={"r": 4, "target_modules": None},
        metric="accuracy",
        lower_is_better=False,
        score=0.8,
        validation_score=0.75,
        extra_metrics={"macro_f1": 0.7},
        train_loss=[(1, 2.0), (2, 1.5), (3, 1.0), (4, 1.0)],
        diverged=False,
        gradient_norm=[(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)],
        validation_curve=[(2, 0.5), (4, 0.75)],
        scored_step=4,
        parameters={"initial": 400, "final": 300, "exported": 350},
        head_parameters=20,
        mean_rank=3.0,
        initial_mean_rank=4.0,
        starting_scale=1.0,
        ranks={"layer.0.query": 4, "layer.1.query": 2},
        exported_ranks={"layer.0.query": 2, "layer.1.query": 1},
        singular_values={"layer.0.query": [1.0, 0.5], "layer.1.query": [2.0, 0.0]},
        seconds_per_step=0.2,
        seconds=1,
        steps_skipped=0,
        train_tokens=64,
        forgetting=None,
        peak_memory=None,
        data_digest="0123456789ab",
        git=None,
        created="2026-01-01T00:00:00+00:00",
        export="exports/lora",
        versions={"torch": "2.13.0"},
        machine="2 cores",
        command="rankwise compare spec.toml",
    )
    return result.model_copy(update=changes)


def test_a_result_reads_back_as_it_was_written(tmp_path):
    results = [made("lora", 1), made("lora", 10), made("adalora", 2)]
    for place, result in enumerate(results):
        write_result(result, tmp_path / "new" / f"{place}.json")
    assert read_results(tmp_path / "new") == [results[2], results[0], results[1]]
    assert json.loads((tmp_path / "new" / "0.json").read_text())["format"] == 4
    jsonschema.validate(json.loads((tmp_path / "new" / "0.json").read_text()), schema())


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    write_result(made(score=0.1), tmp_path / "a.json")
    before = (tmp_path / "a.json").read_bytes()

    def crash(source, target):
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", crash)
    for name in ("a.json", "b.json"):
        with pytest.raises(OSError, match="disk gone"):
            write_result(made(score=0.2), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == before


def test_a_number_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(DataError, match=r"result for a\.json holds a number that is not finite"):
        write_result(made(score=float("nan")), tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def without_score() -> str:
    return json.dumps({key: value for key, value in made().model_dump().items() if key != "score"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (json.dumps(made().model_dump())[:-30], "truncated or not strict JSON"),
        ("", "truncated or not strict JSON"),
        (json.dumps(made(score=float("nan")).model_dump()), "NaN is not JSON"),
        ("[1, 2]", "holds no JSON object"),
        ('{"peft_type": "LORA"}', "a result has format 4; found None"),
        (without_score(), "a result needs `score`"),
        (
            json.dumps(made().model_dump() | {"score": "high"}),
            "`score` of a result should be a valid number; found 'high'",
        ),
        (
            json.dumps(made().model_dump() | {"ranks": {"query": 1.5}}),
            "`ranks.query` of a result should be a valid integer; found 1.5",
        ),
        (
            json.dumps(made().model_dump() | {"diverged": 0}),
            "`diverged` of a result should be a valid boolean; found 0",
        ),
        (json.dumps(made().model_dump() | {"export": 3}), "`export` of a result should be a valid string; found 3"),
        (json.dumps(made().model_dump() | {"train_loss": [[1]]}), "a result needs `train_loss[0][1]`"),
        (json.dumps(made().model_dump() | {"parameters": {"initial": 1}}), "a result needs `parameters.final`"),
    ],
)
def test_a_file_that_is_no_whole_result_is_one_sentence_that_names_it(tmp_path, text, sentence):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_results(tmp_path)
    message = str(caught.value)
    assert sentence in message
    assert message.startswith(str(tmp_path / "bad.json"))
    assert "\n" not in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_results(tmp_path / "nowhere")


def test_rows_hold_medians_and_are_sorted_best_first():
    scores = {"lora": [0.80, 0.82, 0.90], "adalora": [0.70, 0.95, 0.91], "sora": [0.1, 0.2, 0.3]}
    runs = [
        made(
            label, seed, score=score, seconds_per_step=0.1 * (seed + 1) * (3 if label == "sora" else 1), steps_skipped=1
        )
        for label, row in scores.items()
        for seed, score in enumerate(row)
    ]
    rows = summarise(runs)
    assert [row.label for row in rows] == ["adalora", "lora", "sora"]
    best = rows[0]
    assert (best.seeds, best.score, best.lowest, best.highest) == (3, 0.91, 0.70, 0.95)
    assert (best.initial, best.final, best.exported, best.mean_rank, best.steps_skipped) == (400, 300, 350, 3.0, 3)
    assert [row.ratio_to_reference for row in rows] == pytest.approx([1.0, 1.0, 3.0])


def test_the_paired_comparison_uses_the_common_seeds_only():
    lora = [made("lora", seed, score=0.5 + 0.01 * seed) for seed in range(4)]
    sora = [made("sora", seed, score=0.6 + 0.01 * seed) for seed in range(1, 6)]
    rows = {row.label: row for row in summarise(lora + sora)}
    assert rows["lora"].versus_reference is None
    paired = rows["sora"].versus_reference
    assert paired is not None
    assert (paired.seeds, paired.wins, paired.median_difference, paired.p_value) == (3, 3, 0.1, None)
    assert {row.label: row for row in summarise(lora[:3] + sora)}["sora"].versus_reference is None


def test_five_common_seeds_are_tested():
    lora = [made("lora", seed, score=0.5) for seed in range(5)]
    better = [made("sora", seed, score=0.6 + 0.01 * seed) for seed in range(5)]
    same = [made("nnm", seed, score=0.5) for seed in range(5)]
    paired = {row.label: row.versus_reference for row in summarise(lora + better + same)}
    assert paired["sora"] is not None
    assert paired["sora"].p_value == pytest.approx(2 / 2**5)  # all five of one sign, two-sided
    assert paired["nnm"] is not None
    assert paired["nnm"].p_value == 1.0


def test_without_lora_there_is_no_ratio():
    (row,) = summarise([made("sora")])
    assert row.ratio_to_reference is None
    assert row.versus_reference is None


def test_two_runs_of_one_label_and_seed_are_refused():
    with pytest.raises(DataError, match="one run of 'lora' with seed 0; found 2"):
        summarise([made(), made()])


def head(seed: int = 0, **changes: Any) -> Result:
    """A run of the head alone, which has no adapter."""
    nothing: dict[str, Any] = {
        "parameters": {"initial": 0, "final": 0, "exported": 0},
        "ranks": {},
        "exported_ranks": {},
        "singular_values": {},
        "mean_rank": None,
        "initial_mean_rank": None,
        "starting_scale": None,
        "export": None,
    }
    return made("head", seed, **nothing | changes)


def test_a_run_without_an_adapter_reads_back_as_it_was_written(tmp_path):
    write_result(head(), tmp_path / "head.json")
    assert read_results(tmp_path) == [head()]


def test_every_row_is_compared_with_the_head_alone():
    runs = [head(score=0.7), made("lora", score=0.71), made("sora", score=0.7), made("nnm", score=0.69)]
    rows = {row.label: row for row in summarise(runs)}
    assert {label: row.above_floor for label, row in rows.items()} == {
        "head": None,
        "lora": True,
        "sora": False,
        "nnm": False,
    }
    assert [row.label for row in rows.values() if row.is_floor] == ["head"]
    assert (rows["head"].mean_rank, rows["head"].exported_mean_rank, rows["head"].starting_scale) == (None, None, None)
    assert rows["head"].versus_reference is None


def test_the_floor_is_the_median_over_the_seeds():
    floor = [head(seed, score=score) for seed, score in enumerate([0.1, 0.7, 0.9])]
    lora = [made("lora", seed, score=0.71) for seed in range(3)]
    sora = [made("sora", seed, score=0.69) for seed in range(3)]
    rows = {row.label: row.above_floor for row in summarise(floor + lora + sora)}
    assert (rows["lora"], rows["sora"]) == (True, False)


def test_without_a_floor_nothing_is_said_of_it():
    assert [row.above_floor for row in summarise([made("lora")])] == [None]


@pytest.mark.parametrize(
    ("losses", "learnt"),
    [
        ([2.0, 1.0], True),
        ([2.0, 2.0], False),
        ([2.0, 0.5, 2.5], False),
        ([2.0], True),  # a single logged loss tells nothing
        ([], True),
        ([2.0] * 10 + [0.1] + [2.5] * 9, False),  # means of two each: a single good batch is no progress
        ([2.0, 2.4] * 5 + [2.0, 2.1] * 5, True),
        # Five of each end: the first and the last batch of a short run tell nothing by themselves.
        ([1.9, 2.4, 2.2, 2.3, 2.1, 1.8, 1.9, 1.7, 1.8, 2.0], True),
        ([2.4, 1.8, 1.9, 1.7, 1.8, 1.9, 2.1, 2.2, 2.3, 2.0], False),
    ],
)
def test_a_run_has_learnt_if_its_loss_ends_below_its_beginning(losses, learnt):
    assert made(train_loss=list(enumerate(losses, start=1))).has_learnt is learnt


@pytest.mark.parametrize(
    ("scores", "lower_is_better", "improving"),
    [
        ([0.1, 0.2, 0.3], False, True),
        ([0.1, 0.3, 0.3], False, False),
        ([0.1, 0.3, 0.2], False, False),
        ([0.3, 0.2, 0.1], True, True),
        ([0.1, 0.2, 0.3], True, False),
        ([0.3], False, False),
        ([], False, False),
    ],
)
def test_a_run_was_still_improving_if_its_last_validation_score_is_its_best(scores, lower_is_better, improving):
    curve = list(enumerate(scores, start=1))
    assert made(validation_curve=curve, lower_is_better=lower_is_better).still_improving is improving


def test_a_run_whose_loss_was_not_finite_has_not_learnt():
    assert not made(diverged=True).has_learnt


def test_seeds_that_have_not_learnt_are_counted():
    flat = [(1, 2.0), (2, 2.0)]
    runs = [made("sora", 0), made("sora", 1, train_loss=flat), made("sora", 2, train_loss=flat)]
    assert [row.unlearnt for row in summarise(runs)] == [2]


def test_the_exported_rank_is_the_mean_over_modules():
    (row,) = summarise([made()])
    assert (row.mean_rank, row.exported_mean_rank) == (3.0, 1.5)


def searched(scores: dict[float, float], **changes: object) -> list[Result]:
    """One seed at several learning rates, with these validation scores."""
    return [made("lora", 0, learning_rate=rate, validation_score=score, **changes) for rate, score in scores.items()]


def test_a_comparison_is_about_the_rate_with_the_best_validation_score():
    runs = searched({1e-2: 0.7, 1e-3: 0.9, 1e-4: 0.8}) + [made("lora", seed, learning_rate=1e-3) for seed in (1, 2)]
    assert rate_curves(runs) == {"lora": {1e-4: 0.8, 1e-3: 0.9, 1e-2: 0.7}}
    assert best_rates(runs) == {"lora": 1e-3}
    (row,) = summarise(runs)
    assert (row.learning_rate, row.seeds, row.rate_at_edge) == (1e-3, 3, False)


def test_a_rate_at_the_edge_of_its_list_is_flagged():
    for scores, at_edge in (({1e-2: 0.7, 1e-3: 0.9}, True), ({1e-2: 0.7, 1e-3: 0.9, 1e-4: 0.8}, False)):
        (row,) = summarise(searched(scores))
        assert row.rate_at_edge is at_edge
    assert not summarise([made("lora")])[0].rate_at_edge, "a rate that was not searched has no list"


def test_a_rate_is_no_edge_where_one_beyond_it_was_tried_and_failed():
    results = searched({1e-3: 0.7, 1e-2: 0.9})
    assert summarise(results)[0].rate_at_edge
    assert not summarise(results, rates={"lora": (1e-3, 1e-2, 1e-1)})[0].rate_at_edge


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 500}, "the runs of lora must have one steps; found results with several: "),
        ({"fields": {"bound": 2.0}}, "the runs of lora must have one fields; found results with several: "),
        ({"label": "sora", "task": "regression"}, "one comparison must have one task; found results with several: "),
        ({"label": "sora", "data_digest": "other"}, "one comparison must have one data_digest; found results with "),
    ],
)
def test_runs_that_do_not_belong_together_are_not_compared(changes, message):
    with pytest.raises(DataError, match=message):
        summarise([made("lora"), made(**({"label": "lora", "seed": 1} | changes))])


def test_of_a_loss_the_lowest_is_the_best():
    losses = {1e-2: 0.7, 1e-3: 0.9, 1e-4: 0.8}
    assert best_rates(searched(losses, metric="loss", lower_is_better=True)) == {"lora": 1e-2}
    floor = made("pretrained", method="pretrained", metric="loss", lower_is_better=True, score=1.0)
    good, bad = (
        made(label, metric="loss", lower_is_better=True, score=s) for label, s in (("sora", 0.5), ("nnm", 2.0))
    )
    rows = summarise([bad, floor, good])
    assert [row.label for row in rows] == ["sora", "pretrained", "nnm"]
    assert [row.above_floor for row in rows] == [True, None, False]


def test_the_interval_is_that_of_every_resample() -> None:
    differences = [0.05, -0.02, 0.11, 0.03, 0.07]
    lora = [made("lora", seed, score=0.5) for seed in range(5)]
    sora = [made("sora", seed, score=0.5 + difference) for seed, difference in enumerate(differences)]
    paired = {row.label: row for row in summarise(lora + sora)}["sora"].versus_reference
    assert paired is not None
    # Five differences have 5⁵ resamples, few enough to take the median of each.
    medians = [statistics.median(drawn) for drawn in itertools.product(differences, repeat=5)]
    assert paired.interval == pytest.approx(tuple(np.percentile(medians, [2.5, 97.5])), abs=1e-9)
    assert (paired.wins, paired.is_apart) == (4, False)


def test_the_schema_that_ships_is_the_present_one() -> None:
    shipped = Path(str(files("rankwise"))) / "data" / "result.schema.json"
    made_by = "rankwise report --schema > src/rankwise/data/result.schema.json"
    assert json.loads(shipped.read_text()) == schema(), made_by
