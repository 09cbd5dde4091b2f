"""The product of a chain against torch's, and its gradients against autograd's."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from rankwise.linalg.chain import chain


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 3, 3), (4, 2, 2), (5, 3, 2, 2)])
def test_product_and_derivatives(shape: tuple[int, ...]) -> None:
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = reduce(torch.matmul, W.unbind(-3)[::-1])
    torch.testing.assert_close(chain(W), plain)
    assert gradcheck(chain, W)
    assert gradgradcheck(chain, W)


def test_small_factors_keep_their_digits_in_low_precision() -> None:
    W = (1e-3 * torch.eye(3)).repeat(3, 1, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        product = chain(W)
        product.sum().backward()
    torch.testing.assert_close(product, 1e-9 * torch.eye(3), rtol=1e-6, atol=0)
    torch.testing.assert_close(W.grad, torch.full((3, 3, 3), 1e-6), rtol=1e-6, atol=0)
