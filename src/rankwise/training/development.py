"""Running the model between optimiser steps, on a development batch: what it leaves behind is nothing.

Beside plain runs there are runs that are played: every call of a submodule is known from an earlier run of the same
batch, and some calls are answered instead of made.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.roster import Roster
from rankwise.errors import ArgumentError, TrainingError

Batch = Mapping[str, Any]
Development = Batch | Callable[[nn.Module], Any]
"""A mapping of model inputs whose output has `.loss`, or a function of the model."""


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own loss on a batch.

    Raises:
        ArgumentError: the output has no loss.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ArgumentError("score_batch", "give a model output with .loss (does it hold labels?)", sorted(batch))
    return loss


def on_device_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch with its tensors where the model's parameters are."""
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def model_of(roster: Roster) -> nn.Module:
    """The model an adapter belongs to.

    Raises:
        TrainingError: it is not known any more.
    """
    if roster.model is None:
        raise TrainingError(
            f"the model of adapter {roster.adapter!r} is not known, so it cannot be run between steps: make or load "
            "the adapter on the model that trains"
        )
    return roster.model


# --- leaving nothing behind -----------------------------------------------------------------------------------------


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or caches; modes, settings and random states are put back.

    Compiled parts run as plain Python, which sees what is hooked or replaced inside them.
    """
    modes = [(module, module.training) for module in model.modules()]
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    cached = {id(config): (config, config.use_cache) for config in found if getattr(config, "use_cache", False)}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_states())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for config, _ in cached.values():
                config.use_cache = False
            model.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for config, used in cached.values():
                config.use_cache = used


@contextmanager
def random_states() -> Iterator[None]:
    """Put every random generator back to where it was."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def replaced(modules: Iterable[nn.Module], wrap: Callable[[nn.Module, Callable[..., Any]], Any]) -> Iterator[None]:
    """`wrap(module, its forward)` in place of every module's forward."""
    with ExitStack() as stack:
        for module in modules:
            own = module.__dict__.get("forward")
            module.forward = functools.wraps(module.forward)(wrap(module, module.forward))
            stack.callback(_restore, module, own)
        yield


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own


# --- runs that are played -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Call:
    """One call of a module below the model in a run; what an adapted layer does inside is its own affair."""

    module: nn.Module
    parent: Call | None
    start: int
    """When it began, among all beginnings and ends of the run."""
    end: int
    input: tuple[int, ...] | None
    """The shape of its one and only argument, if it is a tensor and is passed by position."""

    def within(self) -> Iterator[Call]:
        """The calls it happened in, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


class DifferentRunError(RuntimeError):
    """A run was not what the noted calls say, or its outputs cannot be told apart from what was made of them later."""


class _Enough(BaseException):
    """Leaves a run whose rest is not needed."""


Answer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What is returned instead of a call, from the module's own forward and the arguments."""


def calls_of(model: nn.Module, batch: Batch) -> tuple[list[Call], float]:
    """Every call of one run in the order they began, and the loss."""
    calls: list[Call] = []
    inside: list[Call] = []
    clock = itertools.count()

    def wrap(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            call = Call(module, inside[-1] if inside else None, next(clock), 0, tuple(args[0].shape) if alone else None)
            calls.append(call)
            inside.append(call)
            output = forward(*args, **kwargs)
            inside.pop()
            call.end = next(clock)
            return output

        return noted

    with replaced(_modules_below(model), wrap):
        loss = float(loss_of(model, batch))
    return calls, loss


def play(
    model: nn.Module,
    batch: Batch,
    calls: Sequence[Call],
    *,
    known: Mapping[Call, Callable[[], Any]] | None = None,
    answers: Mapping[Call, Answer] | None = None,
    collect: Collection[Call] = (),
    until: Call | None = None,
) -> tuple[float, dict[Call, Any]]:
    """Run the model with some calls answered.

    Args:
        model: what is run.
        batch: its inputs.
        calls: every call of an earlier run; this one must make the same, up to what happens inside `known` ones.
        known: gives the output of a call that is not made.
        answers: other replacements of calls, of modules that call no others.
        collect: calls whose outputs are wanted.
        until: the call that ends the run.

    Returns:
        The loss (NaN if `until` came before), and the wanted outputs.

    Raises:
        DifferentRunError: the run makes other calls than the earlier one, or writes to what was collected.
    """
    known, answers = known or {}, answers or {}
    expected = _expected(calls, known, {call.module for call in (*known, *answers, *collect)})
    found: dict[Call, Any] = {}
    versions: list[tuple[Tensor, int]] = []

    def wrap(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        coming = expected[module]

        def played(*args: Any, **kwargs: Any) -> Any:
            if not coming:
                raise DifferentRunError(f"another call of {type(module).__name__}")
            call = coming.popleft()
            if call in known:
                output = known[call]()
            else:
                output = answers[call](forward, args, kwargs) if call in answers else forward(*args, **kwargs)
            if call in collect:
                found[call] = output
                versions.extend(versions_of(output))
            if call is until:
                raise _Enough
            return output

        return played

    loss = float("nan")
    with replaced(expected, wrap), suppress(_Enough):
        loss = float(loss_of(model, batch))
    if len(found) < len(collect):
        raise DifferentRunError(f"{len(collect) - len(found)} calls were not made")
    check_untouched(versions)
    return loss, found


def finished(calls: Sequence[Call], by: int) -> list[Call]:
    """The calls that were over by a time, without those inside them."""
    return [call for call in calls if call.end <= by and (call.parent is None or call.parent.end > by)]


def repeated(value: Any, copies: int, samples: int) -> Any:
    """Copies behind one another of what has one row per sample, in nested tuples, lists and dicts."""
    return _over_tensors(value, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)) if _rows(t) == samples else t)


def row_block(value: Any, k: int, copies: int, samples: int) -> Any:
    """Copy k of what was repeated."""
    rows = slice(k * samples, (k + 1) * samples)
    return _over_tensors(value, lambda t: t[rows] if _rows(t) == copies * samples else t)


def versions_of(value: Any) -> list[tuple[Tensor, int]]:
    """The tensors in nested tuples, lists and dicts, and how often each was written to."""
    found: list[tuple[Tensor, int]] = []
    _over_tensors(value, lambda t: found.append((t, t._version)) or t)
    return found


def check_untouched(versions: Iterable[tuple[Tensor, int]]) -> None:
    """Raise `DifferentRunError` for tensors that were written to since their versions were taken."""
    if any(t._version != version for t, version in versions):
        raise DifferentRunError("a module's output is changed in place")


def _rows(t: Tensor) -> int:
    return t.shape[0] if t.dim() else 0


def _over_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)({key: _over_tensors(item, change) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_over_tensors(item, change) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_over_tensors(item, change) for item in value)
    return value


def _modules_below(model: nn.Module) -> list[nn.Module]:
    inside = {part for m in model.modules() if isinstance(m, AdapterLayer) for part in m.modules() if part is not m}
    return [module for module in model.modules() if module is not model and module not in inside]


def _expected(
    calls: Sequence[Call], known: Mapping[Call, Any], modules: Collection[nn.Module]
) -> dict[nn.Module, deque[Call]]:
    """The calls that some modules will see, in order, when what happens inside known calls does not happen."""
    expected: dict[nn.Module, deque[Call]] = {module: deque() for module in modules}
    hidden: set[Call] = set()
    for call in calls:
        if call.parent is not None and (call.parent in known or call.parent in hidden):
            hidden.add(call)
        elif call.module in expected:
            expected[call.module].append(call)
    return expected


# --- gradients ------------------------------------------------------------------------------------------------------


def backward_through(roster: Roster) -> None:
    """One forward and backward pass on `init_batch`, leaving every `.grad` as it was.

    Raises:
        TrainingError: the model is not known.
    """
    model, batch = model_of(roster), roster.method.init_batch  # type: ignore[attr-defined]  asked for by its users
    with torch.enable_grad(), random_states():
        loss: Any = batch(model) if callable(batch) else loss_of(model, on_device_of(model, batch))
        torch.autograd.grad([loss], [p for p in model.parameters() if p.requires_grad], allow_unused=True)
