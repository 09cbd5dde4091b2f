"""Every registered method on a second device: the same adapter as on the CPU, wherever it is trained and kept."""

from __future__ import annotations

import copy
import io
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import rankwise
from cases import CASES
from conftest import tiny_gpt2
from device_training import (
    CPU,
    PRECISIONS,
    STEPS,
    adapted,
    base,
    config_of,
    deltas,
    logits,
    off,
    optimizer_of,
    rounding_on,
    state,
    strays,
    train,
)
from rankwise.adapters.configs import CONFIGS
from rankwise.adapters.lookup import adapted_layers
from rankwise.methods import METHODS
from rankwise.training.session import session_of
from rankwise.training.status import metrics

pytest_plugins = ["on_device"]
pytestmark = pytest.mark.device

EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
EVERY_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


class Run(NamedTuple):
    """A model after twelve steps, and the loss at each of them."""

    model: Any
    losses: list[float]


@cache
def run_of(name: str, device: torch.device, precision: str = "float32") -> Run:
    """The run that many tests look at; none of them may change the model."""
    model = adapted(name, device, precision)
    losses = train(model, optimizer_of(model), STEPS, precision)
    return Run(model, losses)


def check_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], rounding: float) -> None:
    """Numbers to rounding; counters, masks and seeds exactly.

    Adam moves an entry whose gradient is nothing but rounding as far as any other, so a tensor may be off by ten times
    as much as what the model computes.
    """
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        if tensor.is_floating_point():
            assert off(found[name], tensor) <= 10 * rounding, name
        else:
            assert torch.equal(found[name], tensor), name


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To the bit."""
    assert found.keys() == wanted.keys()
    assert not [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]


# --- training -------------------------------------------------------------------------------------------------------


@EVERY_METHOD
@EVERY_PRECISION
def test_trains_as_on_the_cpu(name: str, precision: str, device: torch.device) -> None:
    """Penalties, allocations and counters are part of the state; in float32 all of it is compared."""
    here, there = run_of(name, CPU, precision), run_of(name, device, precision)
    rounding = rounding_on(device, precision)
    assert not strays(there.model, device)
    assert there.losses == pytest.approx(here.losses, rel=rounding)
    assert there.losses[-1] < there.losses[0]
    if name != "alora" or precision == "float32":  # in fewer digits, ranks of equal scores may change places
        assert off(logits(there.model), logits(here.model)) <= rounding
    if precision == "float32":
        check_alike(state(there.model), state(here.model), rounding)
    dtypes = {key: t.dtype for key, t in state(here.model).items()}
    assert {key: t.dtype for key, t in state(there.model).items()} == dtypes


@EVERY_METHOD
def test_status_is_that_of_the_cpu(name: str, device: torch.device) -> None:
    here, there = (vars(rankwise.status(run_of(name, where).model)).copy() for where in (CPU, device))
    penalty_here, penalty_there = here.pop("last_penalty"), there.pop("last_penalty")
    assert (penalty_there is None) == (penalty_here is None)
    assert (penalty_there or 0.0) == pytest.approx(penalty_here or 0.0, rel=1e-4)
    assert there == here
    rosters = [next(iter(adapted_layers(run_of(name, where).model).values())).rosters for where in (CPU, device)]
    numbers_here, numbers_there = (metrics(found["default"]) for found in rosters)
    assert numbers_there == pytest.approx(numbers_here, rel=1e-4)


@EVERY_METHOD
def test_an_adapter_made_on_the_device_starts_as_on_the_cpu(name: str, device: torch.device) -> None:
    """Where a start reads the base weight, it does so on the device."""
    made = []
    for where in (CPU, device):
        torch.manual_seed(2)
        made.append(get_peft_model(base().to(where), config_of(name, init_weights=False)).eval())
    here, there = made
    assert not strays(there, device)
    assert off(logits(there), logits(here)) <= rounding_on(device)
    trained = train(there, optimizer_of(there), 2)
    assert trained == pytest.approx(train(here, optimizer_of(here), 2), rel=rounding_on(device))


@EVERY_METHOD
def test_a_run_goes_on_where_the_model_is_moved_to(name: str, device: torch.device) -> None:
    """From the CPU to the device and back, the optimiser's state with it."""
    moved = adapted(name, CPU)
    optimizer = optimizer_of(moved)
    for where, steps in ((CPU, 3), (device, 6), (CPU, STEPS - 9)):
        moved.to(where)
        remembered = optimizer.state_dict()
        optimizer = optimizer_of(moved)
        optimizer.load_state_dict(remembered)
        train(moved, optimizer, steps)
    check_alike(state(moved), state(run_of(name, CPU).model), rounding_on(device))


@EVERY_METHOD
def test_bad_gradients_move_nothing(name: str, device: torch.device) -> None:
    model = adapted(name, device, init_weights=False)
    optimizer = optimizer_of(model)
    before = state(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    after = state(model)
    assert all(key.endswith("progress") for key in after if not torch.equal(after[key], before[key]))
    assert rankwise.status(model).steps_skipped == 1


@EVERY_METHOD
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_overflow_of_a_loss_scale_moves_nothing(name: str, fused: bool, device: torch.device) -> None:
    model = adapted(name, device, init_weights=False)
    optimizer = optimizer_of(model, fused=fused, foreach=None)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    losses = []
    for step in range(3):
        before = state(model)
        loss = model.train()(input_ids=torch.arange(24).view(2, 12).to(device)).logits.square().mean()
        scaler.scale(loss * (torch.inf if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = state(model)
        changed = {key.rsplit(".", 1)[1] for key in after if not torch.equal(after[key], before[key])}
        assert (changed == {"progress"}) == (step == 1)
        losses.append(float(loss))
    assert rankwise.status(model).steps_skipped == 1
    assert losses[2] < losses[0]


@EVERY_METHOD
def test_the_final_budget_is_applied_early(name: str, device: torch.device) -> None:
    ends = []
    for where in (CPU, device):
        model = adapted(name, where)
        train(model, optimizer_of(model), 5)
        rankwise.finalize(model)
        ends.append(state(model))
    check_alike(ends[1], ends[0], rounding_on(device))


# --- saved and loaded -----------------------------------------------------------------------------------------------


@EVERY_METHOD
def test_a_resumed_run_ends_as_an_unbroken_one(name: str, device: torch.device, tmp_path: Path) -> None:
    """To the bit on the simulated device; a GPU's sums may come in another order each time."""
    first = adapted(name, device)
    optimizer = optimizer_of(first)
    train(first, optimizer, 5)
    first.save_pretrained(str(tmp_path))
    remembered = io.BytesIO()
    torch.save(optimizer.state_dict(), remembered)

    second = PeftModel.from_pretrained(base().to(device), str(tmp_path), is_trainable=True)
    for unsaved in {"score_batch"} & CASES[name].alone.keys():
        setattr(second.peft_config["default"], unsaved, getattr(config_of(name), unsaved))
    assert not strays(second, device)
    optimizer = optimizer_of(second)
    remembered.seek(0)
    optimizer.load_state_dict(torch.load(remembered, weights_only=True))
    train(second, optimizer, STEPS - 5)

    whole = state(run_of(name, device).model)
    if device.type == "sim":
        check_same(state(second), whole)
    else:
        check_alike(state(second), whole, rounding_on(device))


@EVERY_METHOD
@EVERY_PRECISION
def test_saved_on_one_device_and_loaded_on_the_other(
    name: str, precision: str, device: torch.device, tmp_path: Path
) -> None:
    for saved_on, loaded_on in ((device, CPU), (CPU, device), (device, device)):
        trained = run_of(name, saved_on, precision).model
        folder = tmp_path / f"{saved_on.type} to {loaded_on.type}"
        trained.save_pretrained(str(folder))
        loaded = PeftModel.from_pretrained(base(precision).to(loaded_on), str(folder)).eval()
        assert not strays(loaded, loaded_on)
        # The head is of the base's dtype; the adapter's tensors come back as they were.
        check_same(state(loaded), state(trained))
        assert rankwise.ranks(loaded) == rankwise.ranks(trained)
        assert off(logits(loaded), logits(trained)) <= rounding_on(device, precision)


@EVERY_METHOD
def test_exported_from_the_device(name: str, device: torch.device, tmp_path: Path) -> None:
    trained = run_of(name, device).model
    report = rankwise.export_lora(trained, tmp_path / "lora")
    assert report.relative_error <= 1e-6
    for where in (CPU, device):
        plain = PeftModel.from_pretrained(base().to(where), str(tmp_path / "lora")).eval()
        assert off(logits(plain), logits(trained)) <= rounding_on(device)


@EVERY_METHOD
def test_a_plain_lora_is_taken_up_on_the_device(name: str, device: torch.device, tmp_path: Path) -> None:
    if METHODS[name].refuses_updates:
        pytest.skip(f"{name} takes up no updates")
    trained = run_of("lora", device).model
    rankwise.export_lora(trained, tmp_path / "lora")
    told = {"score_batch": config_of("alora").score_batch} if name == "alora" else {}  # type: ignore[attr-defined]
    config = CONFIGS[name](**{"r": 6, "task_type": "SEQ_CLS"} | CASES[name].alone | told)
    taken_up = rankwise.import_lora(base().to(device), tmp_path / "lora", config).eval()
    assert not strays(taken_up, device)
    assert off(logits(taken_up), logits(trained)) <= rounding_on(device)


# --- merged, switched off, several ----------------------------------------------------------------------------------


@EVERY_METHOD
@EVERY_PRECISION
def test_merged_and_unmerged_to_the_bit(name: str, precision: str, device: torch.device) -> None:
    model = copy.deepcopy(run_of(name, device, precision).model)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    # A merged weight of bfloat16 holds two to three digits of the update.
    assert off(logits(model), expected) <= (0.1 if precision == "bfloat16 base" else rounding_on(device, precision))
    model.unmerge_adapter()
    check_same(model.state_dict(), before)
    assert torch.equal(logits(model), expected)


@EVERY_METHOD
def test_a_disabled_adapter_is_the_base(name: str, device: torch.device) -> None:
    model = adapted(name, device, init_weights=False)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base().to(device)))


@EVERY_METHOD
def test_two_adapters_train_apart(name: str, device: torch.device) -> None:
    model = adapted(name, device)
    train(model, optimizer_of(model), 3)
    first = logits(model)
    model.add_adapter("other", config_of(name))
    model.set_adapter("other")
    train(model, optimizer_of(model), 4)
    assert not strays(model, device)
    assert (rankwise.status(model).step, rankwise.status(model, "other").step) == (3, 4)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


@EVERY_METHOD
def test_two_adapters_at_once_add_up(name: str, device: torch.device) -> None:
    tokens = torch.arange(24).view(2, 12).to(device)
    fields = {"task_type": "CAUSAL_LM", "init_weights": False}
    torch.manual_seed(2)
    model = get_peft_model(tiny_gpt2().to(device), config_of(name, **fields)).eval()
    model.add_adapter("other", config_of(name, **fields))
    model.base_model.set_adapter(["default", "other"])
    plain = tiny_gpt2().eval()
    with torch.no_grad():
        both = model(tokens).logits.cpu()
        for adapter in ("default", "other"):
            for key, delta in deltas(model, adapter).items():
                plain.get_submodule(key).weight += delta
        assert off(both, plain(tokens.cpu()).logits) <= rounding_on(device)


# --- what else reads an adapter -------------------------------------------------------------------------------------


class Other(nn.Module):
    """An embedding and a convolution, which five of the methods adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.convolution = nn.Conv2d(8, 6, (3, 1), padding=(1, 0))

    def forward(self, tokens: Tensor) -> Tensor:
        """One number per sample."""
        image = self.embedding(tokens).mT.unsqueeze(-1)
        return self.convolution(image).square().mean((1, 2, 3))


@EVERY_METHOD
def test_other_kinds_of_layers_train_as_on_the_cpu(name: str, device: torch.device) -> None:
    if METHODS[name].linear_only:
        pytest.skip(f"{name} is for linear layers")
    tokens = torch.arange(12).view(3, 4)
    ends = []
    for where in (CPU, device):
        torch.manual_seed(0)
        told = {"rounds": 0, "score_batch": None} if name == "alora" else {}
        fields = {"r": 2, "target_modules": ["embedding", "convolution"], "init_weights": False}
        model = get_peft_model(Other(), CONFIGS[name](**fields | CASES[name].alone | told)).to(where)
        optimizer = optimizer_of(model)
        for _ in range(4):
            model.train()(tokens.to(where)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.merge_adapter()
        model.unmerge_adapter()
        ends.append(state(model))
    check_alike(ends[1], ends[0], rounding_on(device))


@EVERY_METHOD
def test_spectra_of_a_model_on_the_device(name: str, device: torch.device) -> None:
    here, there = (rankwise.spectral.spectra(rankwise.factors(run_of(name, where).model)) for where in (CPU, device))
    for layer, spectrum in here.items():
        assert there[layer].effective_rank == pytest.approx(spectrum.effective_rank, rel=1e-3)
        torch.testing.assert_close(
            there[layer].singular_values.cpu(), spectrum.singular_values, rtol=1e-3, atol=1e-5, check_dtype=True
        )


def test_a_start_by_the_gradient_of_a_batch_of_its_own(device: torch.device) -> None:
    """Deep LoRA's `init_batch`, given on the CPU."""
    ends = []
    for where in (CPU, device):
        tokens, labels = torch.arange(24).view(2, 12), torch.tensor([0, 2])
        model = adapted("deep", where, init_batch={"input_ids": tokens, "labels": labels})
        train(model, optimizer_of(model), 2)
        ends.append(deltas(model))
    check_alike(ends[1], ends[0], rounding_on(device))


def test_ranks_are_scored_by_a_function(device: torch.device) -> None:
    ends = []
    for where in (CPU, device):
        tokens = torch.arange(24).view(4, 6).to(where)
        model = adapted("alora", where, score_batch=lambda m, x=tokens: -float(m(input_ids=x).logits.square().mean()))
        train(model, optimizer_of(model), 4)
        ends.append(state(model))
    check_alike(ends[1], ends[0], rounding_on(device))


def test_the_cached_residual_of_sorsa(device: torch.device) -> None:
    ends = []
    for where in (CPU, device):
        model = adapted("sorsa", where, residual="cached")
        train(model, optimizer_of(model), 3)
        ends.append(state(model))
    check_alike(ends[1], ends[0], rounding_on(device))


@pytest.mark.parametrize("options", [{"r": 40}, {"lora_dropout": 0.5}], ids=["clamped ranks", "dropout"])
def test_other_ways_through_a_linear_layer(options: dict[str, Any], device: torch.device) -> None:
    """Many ranks, whose update is added to the weight, and dropout, before which nothing is."""
    model = adapted("sorsa", device, **options)
    losses = train(model, optimizer_of(model), 3)
    assert losses[-1] < losses[0]
    assert not strays(model, device)
    assert session_of(next(iter(adapted_layers(model).values())).rosters["default"]).last_penalty is not None
