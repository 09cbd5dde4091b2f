"""One run of a plan: train, score, measure, save, export."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rankwise.adapters.layer import AdapterLayer
from rankwise.compare.candidates import Candidate, candidate_of
from rankwise.compare.checkpoints import newest_complete
from rankwise.compare.forgetting import loss_on_text
from rankwise.compare.models import open_for
from rankwise.compare.plan import Plan, Run
from rankwise.compare.provenance import git_state, library_versions, machine
from rankwise.compare.results import Parameters, Result
from rankwise.compare.scoring import scoring_arguments
from rankwise.compare.tasks import Splits
from rankwise.compare.together import as_first, is_first, on_cpus, processes
from rankwise.compare.tracking import Tracking
from rankwise.compare.validation import Validation
from rankwise.training.recording import look

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
        on_step: told how many optimiser steps are done.
    """
    began = time.perf_counter()
    # The head is made before anything is attached, so that all candidates of one seed start with the same one.
    set_seed(run.seed)
    candidate = candidate_of(plan.spec, run.entry)
    processor = plan.spec.task.open_processor(plan.spec.model)
    splits = plan.splits_of(run.seed)
    pad = getattr(processor, "pad_token_id", None)
    base: Any = open_for(plan.spec.task, plan.spec.model, splits, pad, plan.spec.training)
    _forget_peak_memory()
    if plan.spec.training.quantise is None:  # quantised weights are where they must be, and cannot be moved
        base.to(_device())
    loss_before = _general_loss(plan, base, processor)
    model = candidate.attach(base, plan.steps)

    clock = _Clock(on_step)
    tracking = _tracking(plan, run, candidate, model, output)
    callbacks = [clock, *candidate.callbacks(), *([] if tracking is None else [tracking])]
    trainer: Any = _trainer(plan, run, candidate, model, processor, splits, output, callbacks)
    if candidate.trains:
        # A start from the data may change what trains, so the optimiser is made after it.
        candidate.start(model, trainer.get_train_dataloader)
        trainer.optimizer = _optimizer(plan, run, candidate, model, trainer.args)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    initial_ranks = candidate.ranks(model)
    validation = _validation(plan, run, candidate, trainer, splits, output, tracking)
    resumed = as_first(newest_complete(checkpoints_of(output, run), processes()))
    if candidate.trains:
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))

    # The weights to score are settled before anything is finished, measured or saved.
    scored_step = trainer.state.global_step
    if plan.spec.training.best == "validation":
        trainer.accelerator.wait_for_everyone()  # the first process may still be writing them
        scored_step = validation.restore_best(model, trainer.state)

    trained = model
    model = candidate.finish(trained, output, run.key, command)
    if model is not trained:
        trainer.model = trainer.model_wrapped = model

    parts = {"validation": splits.validation, "test": splits.test}
    scores = {name: plan.spec.task.score(trainer, part, splits) for name, part in parts.items()}
    if tracking is not None:
        tracking.finish(scores)
    loss_after = _general_loss(plan, model, processor)
    export = candidate.save(model, output, run.key, command) if is_first() else None
    measured = candidate.measure(model)
    metric, *extra = scores["test"]
    return Result(
        method=run.entry.name,
        label=run.label,
        seed=run.seed,
        model=plan.spec.to_dict()["model"],
        task=plan.spec.task.title,
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
        train_tokens=int(trainer.state.num_input_tokens_seen) or None,
        train_loss=_logged(trainer, "loss"),
        diverged=_diverged(trainer),
        gradient_norm=_logged(trainer, "grad_norm"),
        validation_curve=validation.curve(trainer.state),
        scored_step=scored_step,
        forgetting=None if loss_before is None or loss_after is None else loss_after - loss_before,
        parameters=Parameters(**measured.parameters),
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
        peak_memory=_peak_memory(),
        export=export,
        data_digest=plan.data_digest,
        git=git_state(plan.spec.folder),
        versions=library_versions(quantised=plan.spec.training.quantise is not None),
        machine=machine(),
        command=command,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
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
            self._on_step(state.global_step)


def _validation(
    plan: Plan,
    run: Run,
    candidate: Candidate,
    trainer: Trainer,
    splits: Splits,
    output: Path,
    tracking: Tracking | None,
) -> Validation:
    """What measures the validation score on the way, as the SPEC asks, with the trainer that it belongs to."""
    task, training = plan.spec.task, plan.spec.training

    def score() -> float:
        scores = task.score(trainer, splits.validation, splits)
        return scores[task.metrics[0]]

    validation = Validation(
        training.evaluated_at(plan.steps),
        score,
        lower_is_better=task.lower_is_better,
        folder=checkpoints_of(output, run) if training.best == "validation" else None,
        first=candidate.settled_from(plan.steps),
        on_value=None if tracking is None else tracking.validated,
    )
    trainer.add_callback(validation)
    return validation


def _trainer(
    plan: Plan,
    run: Run,
    candidate: Candidate,
    model: nn.Module,
    processor: Any,
    splits: Splits,
    output: Path,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The task's own trainer, with what every task's trainer is told."""
    task, training = plan.spec.task, plan.spec.training
    arguments = task.arguments(
        {
            **scoring_arguments(training),
            "output_dir": str(checkpoints_of(output, run)),
            "max_steps": plan.steps,
            "per_device_train_batch_size": training.batch_size // processes() // training.accumulation,
            "gradient_accumulation_steps": training.accumulation,
            "gradient_checkpointing": training.gradient_checkpointing,
            "average_tokens_across_devices": False,  # it multiplies a mean by the number of processes
            "learning_rate": run.learning_rate,
            "warmup_steps": round(training.warmup * plan.steps),
            "lr_scheduler_type": SCHEDULERS[training.scheduler],
            "weight_decay": training.weight_decay,
            "max_grad_norm": training.clip,
            "logging_steps": max(1, plan.steps // 50),
            # Counting reads a number back at every batch, for which an accelerator would have to be waited for.
            "include_num_input_tokens_seen": "non_padding" if _device() == "cpu" else "no",
            "logging_nan_inf_filter": False,  # a loss that is not finite must not pass for a good one
            "save_strategy": "steps" if candidate.keeps_checkpoints else "no",
            "save_steps": max(1, plan.steps // CHECKPOINTS),
            "save_total_limit": 2,
            "seed": run.seed,
        }
    )
    trainer: Any = task.trainer_class(
        model=model,  # type: ignore[arg-type]
        args=arguments,
        processing_class=processor,
        callbacks=callbacks,
        **task.trainer_data(splits, processor),
    )
    task.check_trainer(trainer, splits)
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


def _tracking(plan: Plan, run: Run, candidate: Candidate, model: nn.Module, output: Path) -> Tracking | None:
    """The tracker that the SPEC names, told what the run is; None for a run that trains nothing."""
    if plan.spec.tracker is None or not candidate.trains:
        return None
    settings = {
        "method": run.label,
        "seed": run.seed,
        "model": plan.spec.model,
        "learning_rate": run.learning_rate,
        "head_learning_rate": run.head_learning_rate,
        "steps": plan.steps,
        **candidate.fields,
    }
    is_ours = any(isinstance(module, AdapterLayer) for module in model.modules())
    spectra = (lambda step: look(model, step).record) if is_ours else None
    return Tracking(plan.spec.tracker, output, run.key, settings, lambda: candidate.ranks(model), spectra)


def _general_loss(plan: Plan, model: nn.Module, tokenizer: Any) -> float | None:
    """The loss on the SPEC's general text; None where it names none."""
    if not plan.general_text:
        return None
    return loss_on_text(model, tokenizer, plan.general_text, plan.spec.task.max_length)


def _device() -> str:
    """Where the Trainer will put the model."""
    if on_cpus() or not torch.accelerator.is_available():
        return "cpu"
    return str(PartialState().device)


def _forget_peak_memory() -> None:
    """Let the peak be that of this run, where an earlier one had its own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> int | None:
    """Bytes that the accelerator had allocated at most; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
