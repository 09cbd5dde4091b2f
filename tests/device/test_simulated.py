"""The simulated device is one: memory of its own, errors where devices mix, exact counts."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simulated import counted

pytest_plugins = ["on_device"]
pytestmark = pytest.mark.device


@pytest.fixture
def matrix(simulated_device: torch.device) -> Tensor:
    return torch.arange(12, dtype=torch.float32).view(3, 4).to(simulated_device)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_a_tensor_goes_there_and_back(matrix: Tensor) -> None:
    assert matrix.device.type == "sim"
    assert torch.equal(matrix.cpu(), torch.arange(12.0).view(3, 4))


def test_what_changes_there_does_not_change_here(simulated_device: torch.device) -> None:
    here = torch.ones(3)
    there = here.to(simulated_device)
    there.zero_()
    assert here.sum() == 3
    assert there.cpu().sum() == 0


def test_numpy_cannot_see_it(matrix: Tensor) -> None:
    with pytest.raises(TypeError, match="can't convert sim"):
        matrix.numpy()


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there, here: there + here,
        lambda there, here: there.mT @ here,
        lambda there, here: there.add_(here),
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.where(there > 0, there, here),
        lambda there, here: there[torch.tensor([0, 1])],
        lambda there, here: torch.stack([there.sum(), here.sum()]),
        lambda there, here: torch._foreach_add([there], [here]),
    ],
    ids=["sum", "product", "in place", "cat", "where", "index", "stack of numbers", "foreach"],
)
def test_operations_over_two_devices_are_refused(matrix: Tensor, mixed: Any) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixed(matrix, torch.ones(3, 4))


def test_a_single_number_of_the_cpu_may_take_part(matrix: Tensor) -> None:
    assert float((matrix * torch.tensor(2.0)).sum()) == 132


def test_views_share_memory_and_copies_do_not(matrix: Tensor) -> None:
    matrix[1].fill_(7)
    matrix.T[0, 2] = 9
    matrix.view(2, 6).select(0, 0)[5] = 5
    assert matrix.cpu().tolist() == [[0, 1, 2, 3], [7, 5, 7, 7], [9, 9, 10, 11]]
    twin = matrix.clone()
    twin.zero_()
    assert float(matrix.sum()) == 71
    assert not bool(copy.deepcopy(matrix).sub_(matrix).any())


def test_changes_in_place_are_seen_by_the_version(matrix: Tensor) -> None:
    for change in (lambda: matrix.add_(1), lambda: torch._foreach_copy_([matrix], [torch.ones_like(matrix)])):
        before = matrix._version
        change()
        assert matrix._version > before


def test_outputs_are_resized(matrix: Tensor) -> None:
    out = torch.empty(0, device=matrix.device)
    torch.mm(matrix, matrix.mT, out=out)
    assert out.shape == (3, 3)
    assert float(out[0, 0]) == 14


def test_a_saved_tensor_comes_back(matrix: Tensor) -> None:
    file = io.BytesIO()
    torch.save({"a": matrix}, file)
    for where in ("cpu", matrix.device):
        file.seek(0)
        found = torch.load(file, map_location=where, weights_only=True)["a"]
        assert found.device.type == torch.device(where).type
        assert torch.equal(found.cpu(), matrix.cpu())


# --- operations -----------------------------------------------------------------------------------------------------


def test_a_network_trains_as_on_the_cpu(simulated_device: torch.device) -> None:
    """With an optimiser that moves all tensors at once, clipping, and a loss scale whose overflow skips a step."""
    ends = []
    for device in (torch.device("cpu"), simulated_device):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**4)
        for step in range(4):
            loss = F.cross_entropy(net(torch.randn(5, 6).to(device)), torch.tensor([0, 1, 2, 0, 1], device=device))
            scaler.scale(loss * (torch.inf if step == 2 else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**3
        ends.append(torch.cat([p.detach().flatten().cpu() for p in net.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def test_autocast_takes_lower_precision(matrix: Tensor) -> None:
    layer = nn.Linear(4, 2).to(matrix.device)
    with torch.autocast("sim", torch.bfloat16):
        product = layer(matrix)
        assert product.dtype == torch.bfloat16
        assert product.exp().dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(matrix).dtype == torch.float32


@pytest.mark.parametrize("decompose", [torch.linalg.qr, torch.linalg.svd, torch.linalg.svdvals])
def test_decompositions(matrix: Tensor, decompose: Any) -> None:
    found, expected = decompose(matrix), decompose(matrix.cpu())
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for there, here in pairs:
        torch.testing.assert_close(there.cpu(), here)


# --- counts ---------------------------------------------------------------------------------------------------------


def test_views_cost_nothing(matrix: Tensor) -> None:
    with counted() as counts:
        matrix.T.reshape(4, 3)[1:, ::2].unsqueeze(0).expand(5, -1, -1).detach()
        torch.empty(5, device=matrix.device)
        matrix.chunk(2, 1)
    assert (counts.launches, counts.reads, counts.copies) == (0, 0, 0)


def test_operations_are_counted_by_name(matrix: Tensor) -> None:
    with counted() as counts:
        (matrix @ matrix.mT + 1).relu_()
        matrix.mT.contiguous()
    assert counts.launched == {"aten::mm": 1, "aten::add": 1, "aten::relu_": 1, "aten::copy_": 1}


def test_an_operation_over_a_list_is_one(matrix: Tensor) -> None:
    with counted() as counts:
        torch._foreach_add_([matrix, matrix.clone(), matrix.clone()], 1.0)
    assert counts.launched == {"aten::_foreach_add_": 1, "aten::copy_": 2}


WAITS = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.any()),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "mask": lambda t: t[t > 2],
    "nonzero": lambda t: t.nonzero(),
    "equal": lambda t: torch.equal(t, t + 1),
    "numbers by mask": lambda t: t.clone().index_put_((t < 3,), t.new_zeros(3)),
}
NO_WAITS = {
    "masked_fill": lambda t: t.masked_fill(t > 2, 0),
    "a number by mask": lambda t: t.clone().index_put_((t > 2,), t.new_zeros(())),
    "where": lambda t: torch.where(t > 2, t, 0),
}


@pytest.mark.parametrize("name", [*WAITS, *NO_WAITS])
def test_waits_of_the_host_are_counted(matrix: Tensor, name: str) -> None:
    with counted() as counts:
        (WAITS | NO_WAITS)[name](matrix)
    assert counts.reads == (name in WAITS)
    assert counts.copies == 0


@pytest.mark.parametrize(
    ("makes", "copies"),
    [
        (lambda device: torch.ones(3).to(device), 1),
        (lambda device: torch.tensor([1.0, 2.0], device=device), 1),
        (lambda device: torch._foreach_copy_(list(torch.zeros(3, 2, device=device)), [torch.ones(2)] * 3), 3),
        (lambda device: torch.full((3,), 2.0, device=device), 0),
        (lambda device: torch.arange(3, device=device), 0),
    ],
    ids=["to", "tensor", "foreach", "full", "arange"],
)
def test_copies_from_the_host_are_counted(simulated_device: torch.device, makes: Any, copies: int) -> None:
    with counted() as counts:
        makes(simulated_device)
    assert (counts.reads, counts.copies) == (0, copies)


def test_backward_passes_are_counted_too(matrix: Tensor) -> None:
    weight = matrix.clone().requires_grad_()
    loss = (weight * weight).sum()
    with counted() as counts:
        loss.backward()
    assert counts.launched["aten::mul"] == 2


def test_the_place_of_a_read_is_told(matrix: Tensor) -> None:
    def reading() -> float:
        return float(matrix.sum())

    with counted(places=True) as counts:
        reading()
    assert counts.places == {"read (item) at test_simulated.py:reading": 1}
