"""Two processes train as one does: DDP over gloo, every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cases import CASES
from conftest import tiny_bert
from processes import together
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import TrainingError

STEPS, BATCH = 12, 8
NAMES = pytest.mark.parametrize("name", CASES)


def adapted(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].alone
    return get_peft_model(tiny_bert(), CONFIGS[name](**fields))


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


@NAMES
@pytest.mark.parametrize("accumulate", [2])
def test_ddp_ends_as_one_process_does(name: str, accumulate: int, tmp_path: Path) -> None:
    """From different seeds, since DDP starts from the first process; on the same total batches."""
    assert together(by_ddp, name, tmp_path, 1, accumulate, count=1) == [0]
    assert together(by_ddp, name, tmp_path, 2, accumulate) == [0, 0]
    one, first, second = (load_file(tmp_path / f"{which}.safetensors") for which in ("1-0", "2-0", "2-1"))
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def by_fsdp(rank: int, name: str, folder: Path, accumulate: int) -> None:
    model = adapted(name, seed=0)
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    for name, steps in {"half-way": range(STEPS // 2), "saved": range(STEPS // 2, STEPS)}.items():
        train(model, rank, 2, steps, accumulate)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:  # alone, also while ranks are short of their budget
            model.save_pretrained(str(folder / name), state_dict=whole)


@NAMES
@pytest.mark.parametrize("accumulate", [2])
def test_fsdp2_ends_as_one_process_does(name: str, accumulate: int, tmp_path: Path) -> None:
    assert together(by_ddp, name, tmp_path, 1, accumulate, count=1) == [0]
    assert together(by_fsdp, name, tmp_path, accumulate) == [0, 0]
    one = load_file(tmp_path / "1-0.safetensors")
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "saved")))
    assert loaded.keys() == one.keys()
    for key, value in one.items():
        torch.testing.assert_close(loaded[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


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


def by_hand(rank: int, folder: Path) -> None:
    for name in ("alora", "deep"):
        with pytest.raises(TrainingError, match="the 2 processes cannot agree on what"):
            train(adapted(name, seed=0), rank, 2, range(1), 1)
    train(adapted("salora", seed=0), rank, 2, range(1), 1)
    (folder / str(rank)).touch()


@pytest.mark.parametrize("how", [by_root_alone, by_rounded_shards, by_hand])
def test_what_cannot_go_well_is_refused_at_the_first_step(how: Any, tmp_path: Path) -> None:
    assert together(how, tmp_path) == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
