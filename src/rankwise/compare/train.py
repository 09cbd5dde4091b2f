"""One run of a plan: train, score, measure, save, export."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rankwise.compare.candidates import Candidate, candidate_of
from rankwise.compare.checkpoints import newest_complete
from rankwise.compare.models import open_for
from rankwise.compare.plan import Plan, Run, library_versions
from rankwise.compare.results import Result
from rankwise.compare.together import as_first, is_first, on_cpus, processes

CHECKPOINTS = 5
"""Checkpoints a run writes on its way."""
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""What transformers calls the schedules of a SPEC."""
WARMUP_STEPS = 3
"""First steps left out of the time per step: allocations and caches settle in them."""


def train_run(plan: Plan, run: Run, output: Path, command: str, on_step: Callable[[int], None] | None = None) -> Result:
    """Train one run of a plan and return what it came to.

    A run that was killed goes on from its newest whole checkpoint, and ends as if it had not been. The adapter is saved
    under output/adapters and exported as a plain LoRA under output/exports. On several processes each takes its part of
    every batch, and the first writes.

    Args:
        plan: the checked SPEC.
        run: which of its runs.
        output: the SPEC's output folder.
        command: what the user typed, kept with the result.
        on_step: told how many more optimiser steps are done.
    """
    began = time.perf_counter()
    # The head is made before anything is attached, so that all candidates of one seed start with the same one.
    set_seed(run.seed)
    candidate = candidate_of(plan.spec, run.entry)
    processor = plan.spec.task.open_processor(plan.spec.model)
    base = open_for(plan.spec.task, plan.spec.model, plan.splits, getattr(processor, "pad_token_id", None))
    model = candidate.attach(base, plan.steps)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    initial_ranks = candidate.ranks(model)

    clock = _Clock(on_step)
    trainer = _trainer(plan, run, candidate, model, processor, output, clock)
    resumed = as_first(newest_complete(checkpoints_of(output, run), processes()))
    if candidate.trains:
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))

    splits = {"validation": plan.splits.validation, "test": plan.splits.test}
    scores = {name: plan.spec.task.score(trainer, split, plan.splits) for name, split in splits.items()}
    export = candidate.save(model, output, run.key, command) if is_first() else None
    measured = candidate.measure(model)
    metric, *extra = scores["test"]
    return Result(
        method=run.entry.name,
        label=run.label,
        seed=run.seed,
        model=plan.spec.model,
        task=plan.spec.task.type,
        learning_rate=run.learning_rate,
        head_learning_rate=run.head_learning_rate,
        steps=plan.steps,
        batch_size=plan.spec.training.batch_size,
        fields=candidate.fields,
        metric=metric,
        lower_is_better=plan.spec.task.lower_is_better,
        score=scores["test"][metric],
        validation_score=scores["validation"][metric],
        extra_metrics={name: scores["test"][name] for name in extra},
        train_loss=_logged(trainer, "loss"),
        diverged=_diverged(trainer),
        gradient_norm=_logged(trainer, "grad_norm"),
        parameters=measured.parameters,
        head_parameters=trainable - measured.parameters["initial"],
        mean_rank=_mean(measured.ranks),
        initial_mean_rank=_mean(initial_ranks),
        starting_scale=candidate.starting_scale,
        ranks=measured.ranks,
        exported_ranks=measured.exported_ranks,
        singular_values=measured.singular_values,
        seconds_per_step=statistics.median(clock.seconds[WARMUP_STEPS:] or clock.seconds or [0.0]),
        seconds=time.perf_counter() - began,
        steps_skipped=measured.steps_skipped,
        export=export,
        versions=library_versions(),
        machine=_machine(),
        command=command,
    )


def checkpoints_of(output: Path, run: Run) -> Path:
    """Where a run's Trainer keeps its checkpoints; of no use once the result is written."""
    return output / "checkpoints" / run.key


class _Clock(TrainerCallback):
    """Seconds of each step, as the trainer goes."""

    def __init__(self, on_step: Callable[[int], None] | None) -> None:
        self.seconds: list[float] = []
        self._on_step = on_step
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._on_step and state.global_step:
            self._on_step(state.global_step)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)
        if state.global_step >= state.max_steps:
            control.should_save = False  # a Trainer resumed from its very end would take one step more
        if self._on_step:
            self._on_step(1)


def _trainer(
    plan: Plan, run: Run, candidate: Candidate, model: nn.Module, processor: Any, output: Path, clock: _Clock
) -> Trainer:
    """The task's own trainer, with what every task's trainer is told."""
    task, training = plan.spec.task, plan.spec.training
    arguments = task.arguments(
        {
            "output_dir": str(checkpoints_of(output, run)),
            "max_steps": plan.steps,
            "per_device_train_batch_size": training.batch_size // processes() // training.accumulation,
            "gradient_accumulation_steps": training.accumulation,
            "gradient_checkpointing": training.gradient_checkpointing,
            "bf16": training.precision == "bfloat16",
            "average_tokens_across_devices": False,  # it multiplies a mean by the number of processes
            "use_cpu": bool(on_cpus()) or not torch.accelerator.is_available(),
            "per_device_eval_batch_size": 2 * training.batch_size // training.accumulation,
            "learning_rate": run.learning_rate,
            "warmup_steps": round(training.warmup * plan.steps),
            "lr_scheduler_type": SCHEDULERS[training.scheduler],
            "weight_decay": training.weight_decay,
            "max_grad_norm": training.clip,
            "logging_steps": max(1, plan.steps // 50),
            "logging_nan_inf_filter": False,  # a loss that is not finite must not pass for a good one
            "save_strategy": "steps" if candidate.keeps_checkpoints else "no",
            "save_steps": max(1, plan.steps // CHECKPOINTS),
            "save_total_limit": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": run.seed,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
    )
    optimizer = _optimizer(plan, run, candidate, model, arguments) if candidate.trains else None
    trainer: Any = task.trainer_class(
        model=model,  # type: ignore[arg-type]
        args=arguments,
        optimizers=(optimizer, None),
        processing_class=processor,
        callbacks=[clock, *candidate.callbacks()],
        **task.trainer_data(plan.splits, processor),
    )
    task.check_trainer(trainer, plan.splits)
    _silence(trainer)
    return trainer


def _optimizer(
    plan: Plan, run: Run, candidate: Candidate, model: nn.Module, arguments: TrainingArguments
) -> torch.optim.Optimizer:
    """The Trainer's own optimiser with two groups: what the candidate trains, and the head at its own rate.

    Groups that are given carry their own weight decay; without it they would have torch's default, not the Trainer's.
    """
    own = candidate.own_parameters(model)
    own_ids = {id(parameter) for parameter in own}
    head = [p for p in model.parameters() if p.requires_grad and id(p) not in own_ids]
    decay = arguments.weight_decay
    groups = [
        {"params": own, "lr": run.learning_rate, "weight_decay": decay},
        {"params": head, "lr": run.head_learning_rate, "weight_decay": decay},
    ]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind([group for group in groups if group["params"]], **options)


def _logged(trainer: Trainer, name: str) -> list[tuple[int, float]]:
    """(step, value) as logged, before a resumption too; a value that is not finite is left out."""
    logged = [(int(log["step"]), float(log[name])) for log in trainer.state.log_history if name in log]
    return [(step, value) for step, value in logged if math.isfinite(value)]


def _diverged(trainer: Trainer) -> bool:
    """Whether a logged training loss was not finite."""
    return any(not math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)


def _mean(ranks: dict[str, int]) -> float | None:
    """The mean over modules; None where no module is adapted."""
    return statistics.fmean(ranks.values()) if ranks else None


def _silence(trainer: Trainer) -> None:
    """Without its progress bar the Trainer prints each log; ours goes to the result."""
    from transformers.trainer_callback import PrinterCallback  # noqa: PLC0415  named only to be removed

    trainer.remove_callback(PrinterCallback)


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shared = f", {processes()} processes" if processes() > 1 else ""
    return f"{platform.machine()}, {os.cpu_count()} cores, {device}{shared}"
