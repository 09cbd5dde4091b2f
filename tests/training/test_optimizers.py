"""Optimisers that step others, that call themselves, or that step twice a batch: the rules run once a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_steps import counted
from torch import Tensor

import rankwise
from cases import CASES
from rankwise.errors import TrainingError
from small import FINAL, adapted, check_same, loss_of, state, trained

NAMES = pytest.mark.parametrize("name", CASES)
STEPS = 12


class Wrapped(torch.optim.Optimizer):
    """Steps another one and is an optimiser itself."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Lookahead(Wrapped):
    """Zhang et al., 2019: every k steps the weights go back to α of the way that they have come."""

    def __init__(self, inner: torch.optim.Optimizer, k: int = 3, alpha: float = 0.5) -> None:
        super().__init__(inner)
        self.k, self.alpha, self.steps = k, alpha, 0
        for p in self.parameters():
            self.state[p]["slow"] = p.detach().clone()

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            for p in self.parameters():
                p.copy_(self.state[p]["slow"].lerp_(p, self.alpha))
        return loss


class Sam(Wrapped):
    """Foret et al., 2021, as its common implementation: the gradient is taken where the loss is highest nearby."""

    rho = 0.05

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
        for p in self.parameters():
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=self.rho / (float(norm) + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.parameters():
            p.data = self.state[p].pop("old")
        self.inner.step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


class Many(torch.optim.Optimizer):
    """Several optimisers as one."""

    def __init__(self, inner: list[torch.optim.Optimizer]) -> None:
        self.inner = inner
        super().__init__([group for optimizer in inner for group in optimizer.param_groups], {})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.inner:
            optimizer.step()


class CallsItsBase(torch.optim.AdamW):
    """What most optimisers that extend another class do."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def adamw(model: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2, **options)


def halves(model: Any, **options: Any) -> torch.optim.Optimizer:
    """Two optimisers, each of which moves a part of every layer's tensors."""
    parameters = trained(model)
    return Many([torch.optim.AdamW(parameters[i::2], lr=1e-2, **options) for i in range(2)])


SAME: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "wrapped": lambda model, **options: Wrapped(adamw(model, **options)),
    "wrapped twice": lambda model, **options: Wrapped(Wrapped(adamw(model, **options))),
    "lookahead all the way": lambda model, **options: Lookahead(adamw(model, **options), alpha=1.0),
    "calls its base": lambda model, **options: CallsItsBase(trained(model), lr=1e-2, **options),
    "wrapped, calls its base": lambda model, **options: Wrapped(CallsItsBase(trained(model), lr=1e-2, **options)),
    "two halves": halves,
}
"""Optimisers that do what AdamW does."""


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = STEPS, *, closure: bool = False) -> None:
    for i in range(steps):

        def backward(i: int = i) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, i)
            loss.backward()
            return loss

        if closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()


@NAMES
@pytest.mark.parametrize("how", SAME)
@pytest.mark.parametrize("closure", [False, True])
def test_rules_run_once_around_whatever_moves_the_weights(name: str, how: str, closure: bool) -> None:
    """With weight decay, from which gates are kept free while an inner optimiser moves them."""
    if how == "two halves" and closure:
        return  # nobody's closure is called by two optimisers
    ends = []
    for make in (adamw, SAME[how]):
        model = adapted(name, **({"learn_split": False} if name == "nblora" else {}))
        train(model, make(model, weight_decay=0.1), closure=closure)
        assert counted(model) == (STEPS, STEPS, 0)
        ends.append(state(model))
    check_same(*ends)


def gradient_of(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trained(model) if p.grad is not None])


@pytest.mark.parametrize("how", SAME)
def test_a_penalty_joins_the_gradient_once(how: str) -> None:
    found = []
    for make in (adamw, SAME[how]):
        model = adapted("nnm")
        loss_of(model, 0).backward()
        make(model).step()
        found.append(gradient_of(model))
    assert torch.equal(*found)
    assert float(found[0].norm()) > 1


@NAMES
def test_lookahead_leaves_pruned_ranks_pruned(name: str) -> None:
    """The rules after the move run when it has interpolated the weights."""
    model = adapted(name, **({"sparse_weight": 60.0} if name == "sora" else {}))
    optimizer = Lookahead(adamw(model, weight_decay=0.1), k=2)
    for step in range(1, STEPS + 1):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert counted(model) == (step, step, 0)
        if name == "sora" or step >= FINAL.get(name, STEPS + 1):
            ranks = rankwise.ranks(model)
            held = {key: f.kept().r for key, f in rankwise.factors(model).items()}
            assert all(held[key] <= ranks[key] for key in ranks)
    if name in (*FINAL, "sora"):
        assert sum(rankwise.ranks(model).values()) < (18 if name == "adalora" else 12) or name == "alora"


@NAMES
def test_lookahead_does_not_decay_gates(name: str) -> None:
    """What is shown to AdamW as a zero has its value again when Lookahead interpolates."""
    ends = []
    for decay in (0.0, 0.5):
        model = adapted(name, init_weights=False, **({"sparse_weight": 0.0} if name == "sora" else {}))
        loss_of(model, 0).backward()
        Lookahead(adamw(model, weight_decay=decay), k=1).step()
        exact = [p for key, p in model.named_parameters() if key.rsplit(".", 1)[1] in ("g", "Lambda", "S", "log_theta")]
        ends.append([p.detach().clone() for p in exact])
    for without, decayed in zip(*ends, strict=True):
        torch.testing.assert_close(decayed, without, rtol=1e-5, atol=1e-6)


# --- two steps a batch ----------------------------------------------------------------------------------------------


@NAMES
def test_sam_counts_a_batch_once_however_it_is_called(name: str) -> None:
    """By `first_step` and `second_step`, between which the weights are elsewhere, or by a closure."""
    ends = []
    for closure in (False, True):
        model = adapted(name, **({"learn_split": False} if name == "nblora" else {}))
        optimizer = Sam(adamw(model, weight_decay=0.1))
        for i in range(STEPS):
            loss_of(model, i).backward()
            if closure:
                optimizer.step(lambda model=model, i=i: loss_of(model, i).backward())
            else:
                optimizer.first_step()
                loss_of(model, i).backward()
                optimizer.second_step()
            optimizer.zero_grad()
            assert counted(model) == (i + 1, i + 1, 0)
        assert rankwise.status(model).final_ranks_due is None
        ends.append(state(model))
    check_same(*ends)


def test_rules_of_sam_see_the_weights_themselves_and_the_gradient_nearby() -> None:
    """NNM-LoRA's penalty, −λ·polar(A)/‖A‖_F, is taken at A and not at the weights that SAM has moved."""
    found = []
    for make in (Sam, Wrapped):
        model = adapted("nnm")
        optimizer = make(adamw(model))
        loss_of(model, 0).backward()
        if make is Sam:
            optimizer.first_step()
            (0 * loss_of(model, 0)).backward()
            optimizer.second_step()
        else:
            for p in trained(model):
                p.grad.zero_()
            optimizer.step()
        found.append(gradient_of(model))
    assert torch.equal(*found)


@NAMES
def test_an_inner_optimiser_that_is_stepped_twice_makes_two_steps(name: str) -> None:
    class Twice(Wrapped):
        def step(self, closure: Any = None) -> None:
            for _ in range(2):
                self.inner.step(closure)

    ends = []
    for make in (adamw, lambda model: Twice(adamw(model))):
        model = adapted(name)
        optimizer = make(model)
        for i in range(STEPS // 2):

            def backward(i: int = i, model: Any = model, optimizer: Any = optimizer) -> None:
                optimizer.zero_grad()
                loss_of(model, i).backward()

            for _ in range(2 if make is adamw else 1):
                optimizer.step(backward)
        assert counted(model) == (STEPS, STEPS, 0)
        ends.append(state(model))
    check_same(*ends)


@NAMES
def test_an_inner_optimiser_that_is_not_stepped_makes_none(name: str) -> None:
    """A wrapper that accumulates gradients by itself."""

    class EveryFourth(Wrapped):
        calls = 0

        def step(self, closure: Any = None) -> None:
            self.calls += 1
            if self.calls % 4 == 0:
                self.inner.step()
                self.inner.zero_grad()

    model = adapted(name)
    optimizer = EveryFourth(adamw(model))
    for i in range(4 * STEPS):
        loss_of(model, i).backward()
        optimizer.step()
        assert counted(model) == ((i + 1) // 4, (i + 1) // 4, 0)
    assert rankwise.status(model).final_ranks_due is None


# --- what cannot work, and what goes wrong --------------------------------------------------------------------------


def test_an_inner_optimiser_out_of_sight_is_refused() -> None:
    class Hidden(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.run = inner.step

        def step(self, closure: Any = None) -> None:
            self.run()

    model = adapted("sora")
    optimizer = Hidden(adamw(model, weight_decay=0.1))
    loss_of(model, 0).backward()
    with pytest.raises(TrainingError, match=r"step\(\) of Hidden calls that of AdamW .* does not hold it"):
        optimizer.step()


def test_an_inner_optimiser_that_holds_a_shard_is_refused_by_its_true_reason() -> None:
    """As torch's `ZeroRedundancyOptimizer`, which gives each process's inner optimiser a part of the parameters."""

    class Sharded(torch.optim.Optimizer):
        def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
            super().__init__(parameters, {"lr": 1e-2})
            self.optim = torch.optim.AdamW(parameters[::2])

        def step(self, closure: Any = None) -> Any:
            self.optim.step()

    model = adapted("lora")
    optimizer = Sharded(trained(model))
    loss_of(model, 0).backward()
    with pytest.raises(TrainingError, match=r"Sharded calls that of AdamW .* holds it with a part .*ZeroRedundancy"):
        optimizer.step()


class Fails(torch.optim.SGD):
    """Raises at some of its calls, after it has begun."""

    failures = 1

    def step(self, closure: Any = None) -> Any:
        self.failures -= 1
        if self.failures >= 0:
            raise RuntimeError("out of memory")
        return super().step(closure)


@NAMES
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_step_that_raised_is_none_and_the_next_one_is(name: str, wrapped: bool) -> None:
    """The loop catches the exception and goes on with the next batch."""
    ends = []
    for failing in (False, True):
        model = adapted(name)
        inner = Fails(trained(model), lr=1e-2, weight_decay=0.1)
        inner.failures = int(failing)
        optimizer = Wrapped(inner) if wrapped else inner
        if failing:
            before = state(model)
            with pytest.raises(RuntimeError, match="out of memory"):
                train(model, optimizer, 1)
            other = torch.nn.Linear(2, 2)  # some other optimiser's step is what notices
            adapted_elsewhere = adapted("lora")
            loss_of(adapted_elsewhere, 0).backward()
            torch.optim.SGD(trained(adapted_elsewhere), lr=0.1).step()
            torch.optim.SGD(other.parameters(), lr=0.1).step()
            if name != "adalora":  # its averages were written before the move
                check_same(before, state(model))
        else:
            train(model, optimizer, 0)
        train(model, optimizer, 3)
        assert counted(model) == (3, 3, 0)
        ends.append(state(model))
    if name not in ("adalora", "salora"):
        check_same(*ends)


@NAMES
def test_a_wrapper_that_tries_again_makes_one_step(name: str) -> None:
    """The inner step raised, the outer one caught it; the penalty is in the gradient already."""

    class Retries(Wrapped):
        def step(self, closure: Any = None) -> Any:
            try:
                return self.inner.step(closure)
            except RuntimeError:
                return self.inner.step(closure)

    ends = []
    for failures in (0, 1):
        model = adapted(name)
        inner = Fails(trained(model), lr=1e-2, weight_decay=0.1)
        inner.failures = failures
        train(model, Retries(inner), 3)
        assert counted(model) == (3, 3, 0)
        ends.append(state(model))
    check_same(*ends)


@NAMES
def test_weights_moved_outside_of_their_optimisers_step_are_an_error(name: str) -> None:
    model = adapted(name, init_weights=False)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    loss_of(model, 1).backward()
    with torch.no_grad():
        for p in trained(model):
            p += 0.1
    with pytest.raises(TrainingError, match=r"moved them outside of the step\(\) of their optimiser \(AdamW\)"):
        loss_of(model, 2)


@NAMES
def test_an_optimiser_that_holds_another_and_moves_weights_itself_is_an_error(name: str) -> None:
    """Rules wait for the step of the inner one, which never comes."""

    class Usurper(Wrapped):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p -= 0.1

    model = adapted(name, init_weights=False)
    optimizer = Usurper(adamw(model))
    with pytest.raises(TrainingError, match=r"moved them outside of the step\(\) of their optimiser"):
        train(model, optimizer, 3)
    assert counted(model) == (0, 0, 0)


@NAMES
def test_an_engine_is_noticed_with_the_first_layer_frozen(name: str) -> None:
    model = adapted(name, init_weights=False)
    for key, p in model.named_parameters():
        if ".0." in key:
            p.requires_grad_(False)
    loss_of(model, 0).backward()
    with torch.no_grad():
        for p in trained(model):
            p.data = p.data + 0.1
            p.grad = None
    with pytest.raises(TrainingError, match="an engine that bypasses torch's optimiser hooks"):
        loss_of(model, 1)
