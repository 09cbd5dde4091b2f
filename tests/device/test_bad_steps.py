"""Gradients that are not finite, where nobody waits for the device to say so: a fused optimiser on a second device.

The device stops the step by a flag, and the host counts it one step later (`rankwise.training.verdict`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise
from device_training import CPU, STEPS, adapted, batch_on, off, rounding_on, state
from rankwise.adapters.lookup import adapted_layers
from rankwise.errors import TrainingError
from rankwise.methods import METHODS
from rankwise.training.session import session_of

pytest_plugins = ["on_device"]
pytestmark = pytest.mark.device

EACH = pytest.mark.parametrize("name", METHODS)


class Run:
    """A model in training under a fused optimiser, with weight decay, which moves weights without gradients too."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.model: Any = adapted(name, device).train()
        self.batch = batch_on(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1, fused=True)

    def step(self, factor: float = 1.0, scaler: Any = None) -> None:
        """One step; a factor of NaN or infinity spoils every gradient."""
        loss = self.model(**self.batch).loss * factor
        if scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad()

    def steps(self, factors: Iterable[float]) -> None:
        """Some steps."""
        for factor in factors:
            self.step(factor)

    @property
    def counters(self) -> Any:
        """As the host has them, caught up with the device."""
        roster = next(iter(adapted_layers(self.model).values())).rosters["default"]
        return session_of(roster).progress()

    def tensors(self) -> dict[str, Tensor]:
        """All that a step could move: what trains, what rules keep, and the optimiser's state."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        kept = {name: b for name, b in self.model.named_buffers() if "rankwise" in name and "progress" not in name}
        remembered = {
            f"{name} {key}": value
            for name, p in trained.items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        return {name: t.detach().cpu().clone() for name, t in (trained | kept | remembered).items()}


@EACH
@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_bad_step_moves_nothing_and_is_counted(name: str, factor: float, device: torch.device) -> None:
    run = Run(name, device)
    run.steps([1.0] * 3)
    before = run.tensors()
    run.step(factor)
    after = run.tensors()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert after.keys() == before.keys()
    counters = run.counters
    assert (counters.step, counters.last, counters.rules, counters.skipped, counters.bad) == (4, 3, 3, 1, 1)
    run.step()
    assert all(bool(torch.isfinite(t).all()) for t in run.tensors().values())
    assert (run.counters.last, run.counters.rules, run.counters.bad) == (5, 4, 0)


@EACH
def test_a_run_with_bad_steps_ends_as_on_the_cpu(name: str, device: torch.device) -> None:
    """Where the host looks at once. In a third of the steps something is due: an allocation, a round, a phase's end."""
    ends = []
    for where in (CPU, device):
        run = Run(name, where)
        run.steps(torch.nan if step in (2, 3, 6, 8) else 1.0 for step in range(1, STEPS + 1))
        ends.append((state(run.model), rankwise.status(run.model), run.tensors()))
    (here, known, _), (there, told, _) = ends
    assert (told.rules_run, told.steps_skipped, told.ranks) == (known.rules_run, known.steps_skipped, known.ranks)
    for key, wanted in here.items():
        if key.endswith("progress"):
            assert torch.equal(there[key], wanted)
        elif wanted.is_floating_point():
            assert off(there[key], wanted) <= 3 * rounding_on(device), key  # twelve steps of Adam
        else:
            assert torch.equal(there[key], wanted), key


def test_five_bad_steps_in_a_row_stop_the_run_one_step_later(device: torch.device) -> None:
    run = Run("lora", device)
    run.steps([1.0, 1.0, torch.nan, 1.0, *[torch.nan] * 5])
    with pytest.raises(TrainingError, match="NaN or infinite in 5 steps in a row, up to step 9"):
        run.step()


def test_a_checkpoint_of_a_bad_step_has_its_true_counters(device: torch.device) -> None:
    run = Run("sora", device)
    run.steps([1.0, 1.0, torch.nan])
    saved = state(run.model)
    counters = [value.tolist() for key, value in saved.items() if key.endswith("progress")]
    assert {tuple(each[:2]) for each in counters} == {(3, 2)}
    assert {each[5] for each in counters} == {1}


def test_what_is_loaded_after_a_bad_step_is_not_counted_on(device: torch.device) -> None:
    run = Run("lora", device)
    run.step()
    saved = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.steps([1.0, torch.nan])
    run.model.load_state_dict(saved)
    assert (run.counters.step, run.counters.skipped) == (1, 0)


def test_an_overflow_of_a_loss_scale_is_skipped_and_not_bad(device: torch.device) -> None:
    run = Run("adalora", device)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**4)
    for _ in range(2):
        run.step(scaler=scaler)
    before = run.tensors()
    run.step(torch.inf, scaler)
    after = run.tensors()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert scaler.get_scale() == 2.0**3
    run.step(scaler=scaler)
    assert (run.counters.step, run.counters.rules, run.counters.skipped, run.counters.bad) == (4, 3, 1, 0)


def test_weights_that_move_without_a_step_are_noticed_one_pass_later(device: torch.device) -> None:
    """As an engine moves them that passes by torch's hooks."""
    run = Run("lora", device)
    run.step()
    for _ in range(2):
        run.model(**run.batch).loss.backward()
        for p in run.model.parameters():
            if p.requires_grad:
                p.data.add_(0.01)
    with pytest.raises(TrainingError, match="moved after a backward pass and no optimiser step was seen"):
        run.model(**run.batch)


def test_the_flag_is_of_one_step(device: torch.device) -> None:
    run = Run("lora", device)
    run.steps([1.0, torch.nan])
    assert not hasattr(run.optimizer, "found_inf")


def test_huge_finite_gradients_are_a_step(device: torch.device) -> None:
    """Their norm overflows, and they do not."""
    run = Run("lora", device)
    run.step()
    for p in run.model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 3e38)
    run.optimizer.step()
    assert (run.counters.rules, run.counters.skipped) == (2, 0)


def test_other_fused_optimisers_read_the_flag_too(device: torch.device) -> None:
    run = Run("lora", device)
    trained = run.optimizer.param_groups[0]["params"]
    run.optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)
    run.steps([1.0] * 2)
    before = run.tensors()
    run.step(torch.nan)
    after = run.tensors()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert run.counters.skipped == 1


def test_other_optimisers_are_asked_at_once(device: torch.device) -> None:
    """One that knows of no flag: the step is skipped before it begins."""
    run = Run("lora", device)
    run.optimizer = torch.optim.AdamW(run.optimizer.param_groups[0]["params"], lr=3e-3, foreach=True)
    run.steps([1.0, torch.nan])
    assert (run.counters.rules, run.counters.skipped, run.counters.bad) == (1, 1, 1)
