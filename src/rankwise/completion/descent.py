"""Gradient descent on a deep product, as the theory has it.

Source: Yaras, Wang, Balzano and Qu, arXiv 2406.04112, equations 4, 9 and 11.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rankwise.completion.entries import Entries
from rankwise.completion.misfit import misfit
from rankwise.errors import ArgumentError


def sides(chain: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """P and Q of P·Qᵀ = M_1 ⋯ M_k, the last factor on its own, the others multiplied in the cheapest order."""
    *first, last = chain
    return (torch.linalg.multi_dot(first) if len(first) > 1 else first[0]), last.mT


def descent(
    entries: Entries,
    chain: Sequence[Tensor],
    *,
    rate: float,
    outer_ratio: float | None,
    weight_decay: float = 0.0,
    center: bool = False,
) -> Iterator[tuple[list[Tensor], float]]:
    """The factors before each step and the loss there, W_l ← (1 − ηλ)·W_l − η·∂loss/∂W_l (eq. 4), without end.

    Args:
        entries: Ω and M.
        chain: the factors of the start, from left to right; they are not changed.
        rate: η.
        outer_ratio: γ of eq. 11, the rate of the first and last factor, U and Vᵀ, relative to η; at 0 they stay as they
            are (eq. 9). None: there are none, all are W_l (eq. 4). Weight decay is that of the W_l.
        weight_decay: λ.
        center: whether an offset is fitted beside the product.
    """
    factors = [factor.clone().requires_grad_() for factor in chain]
    inner, outer = (factors, []) if outer_ratio is None else (factors[1:-1], [factors[0], factors[-1]])
    groups = [{"params": inner, "weight_decay": weight_decay}]
    if outer_ratio:
        groups.append({"params": outer, "lr": rate * outer_ratio})
    else:
        for factor in outer:
            factor.requires_grad_(False)
    optimizer = torch.optim.SGD(groups, lr=rate)
    while True:
        optimizer.zero_grad()
        loss = misfit(entries, *sides(factors), center=center)
        now = float(loss.detach())
        if not math.isfinite(now):
            raise ArgumentError("learning_rate", "be smaller: gradient descent diverges", rate)
        yield [factor.detach() for factor in factors], now
        loss.backward()
        optimizer.step()
