"""Two processes train as one does: FSDP2 over gloo, every method; and what cannot go well on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rankwise
from cases import CASES
from conftest import tiny_bert
from processes import together
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import ArgumentError, RankwiseError, TrainingError

STEPS, BATCH, ACCUMULATE = 12, 8, 2
NAMES = pytest.mark.parametrize("name", CASES)


def adapted(name: str, seed: int) -> Any:
    base = tiny_bert()  # which sets a seed of its own
    torch.manual_seed(seed)
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].alone
    return get_peft_model(base, CONFIGS[name](**fields))


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 3, (BATCH,), generator=generator)
    return {
        "input_ids": torch.randint(0, 30, (BATCH, 10), generator=generator) + 30 * labels[:, None],
        "labels": labels,
    }


def train(model: Any, rank: int, world: int, steps: range, accumulate: int) -> None:
    """SGD, in which a rounding stays one, on this process's part of every batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for step in steps:
        for part in range(accumulate):
            mine = {key: value[part::accumulate][rank::world] for key, value in batch(step).items()}
            (model(**mine).loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_ddp(rank: int, name: str, folder: Path, world: int, accumulate: int) -> None:
    model = adapted(name, seed=rank)
    train(DistributedDataParallel(model) if world > 1 else model, rank, world, range(STEPS), accumulate)
    save_file(get_peft_model_state_dict(model), folder / f"{world}-{rank}.safetensors")


def sharded(model: Any) -> Any:
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def train_and_save(model: Any, rank: int, steps: range, folder: Path) -> None:
    train(model, rank, 2, steps, ACCUMULATE)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # alone, also while ranks are short of their budget
        model.save_pretrained(str(folder), state_dict=whole)


def by_fsdp(rank: int, name: str, folder: Path) -> None:
    model = sharded(adapted(name, seed=0))
    train_and_save(model, rank, range(STEPS // 2), folder / "half-way")
    train_and_save(model, rank, range(STEPS // 2, STEPS), folder / "saved")
    ranks, updates, step = rankwise.ranks(model), rankwise.factors(model), rankwise.status(model).step
    if rank == 0:
        whole = PeftModel.from_pretrained(tiny_bert(), str(folder / "saved"))
        assert (ranks, step) == (rankwise.ranks(whole), rankwise.status(whole).step)
        for module, update in rankwise.factors(whole).items():
            torch.testing.assert_close(updates[module].delta(), update.delta())


def by_fsdp_again(rank: int, name: str, folder: Path) -> None:
    model = PeftModel.from_pretrained(tiny_bert(), str(folder / "half-way"), is_trainable=True)
    if "score_batch" in CASES[name].alone:
        model.peft_config["default"].score_batch = CASES[name].alone["score_batch"]  # type: ignore[attr-defined]
    train_and_save(sharded(model), rank, range(STEPS // 2, STEPS), folder / "again")


@NAMES
def test_fsdp2_ends_as_one_process_does_and_goes_on_from_what_it_saved(name: str, tmp_path: Path) -> None:
    assert together(by_ddp, name, tmp_path, 1, ACCUMULATE, count=1) == [0]
    assert together(by_fsdp, name, tmp_path) == [0, 0]
    assert together(by_fsdp_again, name, tmp_path) == [0, 0]
    one, two, again = (
        load_file(tmp_path / file)
        for file in ("1-0.safetensors", "saved/adapter_model.safetensors", "again/adapter_model.safetensors")
    )
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "saved")))
    assert loaded.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(loaded[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert two.keys() == again.keys()
    assert all(torch.equal(again[key], two[key]) for key in two)


def by_loss_scale(rank: int, name: str, folder: Path) -> None:
    """The gradients overflow in one process's shards alone, and all processes skip the step."""
    model = sharded(adapted(name, seed=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        scaler.scale(model(**batch(step)).loss).backward()
        if step % 2 == 0 and rank == 0:
            next(p for p in model.parameters() if p.grad is not None).grad.to_local().fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        told = rankwise.status(model)
        assert (told.step, told.rules_run, told.steps_skipped) == (step + 1, (step + 1) // 2, step // 2 + 1)
        scaler.update()
        optimizer.zero_grad()
    (folder / str(rank)).touch()


@NAMES
def test_a_step_that_a_loss_scale_skips_is_counted_under_fsdp2(name: str, tmp_path: Path) -> None:
    assert together(by_loss_scale, name, tmp_path) == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def by_root_alone(rank: int, folder: Path) -> None:
    model = adapted("sora", seed=0)
    fully_shard(model)
    with pytest.raises(TrainingError, match="call fully_shard on its blocks first"):
        train(model, rank, 2, range(1), 1)
    (folder / str(rank)).touch()


def by_rounded_shards(rank: int, folder: Path) -> None:
    model = adapted("sora", seed=0)
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(TrainingError, match="leave param_dtype out"):
        train(model, rank, 2, range(1), 1)
    (folder / str(rank)).touch()


def by_fsdp1(rank: int, folder: Path) -> None:
    """With the parameters kept, as torch itself wants it where some are frozen."""
    model = FullyShardedDataParallel(adapted("sora", seed=0), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(TrainingError, match="in pieces, as FSDP1 cuts them"):
        train(model, rank, 2, range(1), 1)
    (folder / str(rank)).touch()


def by_shards_of_a_batch_told(rank: int, folder: Path) -> None:
    model = adapted("deep", seed=0)
    model.peft_config["default"].init_batch = batch(0)
    with pytest.raises(ArgumentError, match="`init_batch` must"):
        train(sharded(model), rank, 2, range(1), 1)
    (folder / str(rank)).touch()


def by_shards_exported(rank: int, folder: Path) -> None:
    model = sharded(adapted("sora", seed=0))
    train(model, rank, 2, range(1), 1)
    with pytest.raises(RankwiseError, match="save it whole and export the folder"):
        rankwise.export_lora(model, folder / "lora")
    (folder / str(rank)).touch()


def by_hand(rank: int, folder: Path) -> None:
    for name in ("alora", "deep"):
        with pytest.raises(TrainingError, match="the 2 processes cannot agree on what"):
            train(adapted(name, seed=0), rank, 2, range(1), 1)
    train(adapted("salora", seed=0), rank, 2, range(1), 1)
    (folder / str(rank)).touch()


REFUSED = [by_root_alone, by_rounded_shards, by_fsdp1, by_shards_of_a_batch_told, by_shards_exported, by_hand]


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_go_well_is_refused(how: Any, tmp_path: Path) -> None:
    assert together(how, tmp_path) == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def by_ddp_compiled(rank: int, folder: Path) -> None:
    """Each process tells Deep LoRA a batch of its own, and ALoRA the same."""
    for name in ("alora", "deep"):
        torch.manual_seed(rank)
        told = {"init_batch": batch(rank)} if name == "deep" else {}
        fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].alone | told
        model = get_peft_model(tiny_bert(), CONFIGS[name](**fields))
        train(torch.compile(DistributedDataParallel(model), backend="eager"), rank, 2, range(STEPS), 1)
        save_file(get_peft_model_state_dict(model), folder / f"{name}-{rank}.safetensors")


@pytest.mark.slow
def test_compiled_under_ddp_processes_agree(tmp_path: Path) -> None:
    assert together(by_ddp_compiled, tmp_path) == [0, 0]
    for name in ("alora", "deep"):
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)
