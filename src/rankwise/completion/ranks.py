"""The rank of a completion: where its singular values break off, else where held-out entries are met best.

Of held-out entries two things are asked, since real matrices seldom break off: how many ranks, and how much ridge λ of
½λ(‖P‖² + ‖Q‖²), that is λ‖X‖_*, they are held by. Both begin small and grow while the held-out error falls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.completion.entries import Entries
from rankwise.completion.polish import polish
from rankwise.completion.standard import size

CLEAR = 10.0
"""The ratio of successive singular values that is taken for the rank's."""
RIDGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""λ in units of the share observed, the matrix having a spectral norm of about 1."""
BETTER = 0.99
"""What the held-out error must fall to for more ranks or another ridge to be preferred."""
TRIES = 30
"""Iterations of alternating least squares that a choice is judged by."""


class Choice(NamedTuple):
    """Ranks, ridge as a multiple of the share observed, and the relative error of held-out entries with them."""

    rank: int
    ridge: float
    error: float


def break_off(S: Tensor, most: int) -> tuple[int, float]:
    """The k ≤ `most` of the largest ratio σ_k/σ_{k+1} of falling singular values, and the ratio."""
    tail = S[1 : most + 1].clamp_min(torch.finfo(S.dtype).eps * S[0])
    if len(tail) == 0:
        return 1, float("inf")
    ratios = S[: len(tail)] / tail
    k = int(ratios.argmax())
    return k + 1, float(ratios[k])


def by_held_out(train: Entries, held: Entries, P: Tensor, Q: Tensor, *, also: int, center: bool) -> Choice:
    """Ranks and ridge by the error of entries that the fit does not see.

    Args:
        train, held: entries to fit and to judge by.
        P, Q: balanced factors (m, k), (n, k) that a fit of `train` has come to, largest first: where each try starts.
        also: a number of ranks to try beside 1, 2, 3, 4, 6, 8, 11, ….
        center: whether there is an offset.
    """
    whole = size(held.data)
    share = train.count / (train.shape[0] * train.shape[1])

    def judged(k: int, ridge: float) -> Choice:
        fit, _ = polish(train, P[:, :k], Q[:, :k], center=center, tol=1e-4, max_iter=TRIES, ridge=ridge * share)
        values = held.at(fit.P, fit.Q) + fit.offset * held.ones - held.data
        return Choice(k, ridge, size(values) / whole)

    ranks = sorted({*_steps(P.shape[1]), min(also, P.shape[1])})
    best = Choice(0, 0.0, 1.0)
    for at, ridge in enumerate(RIDGES):
        before, worse = best, 0
        for k in ranks[max(0, ranks.index(best.rank) - 1) if best.rank else 0 :]:
            found = judged(k, ridge)
            worse = 0 if found.error < BETTER * best.error else worse + 1
            best = best if worse else found
            if worse == 2:
                break
        if at >= 2 and best is before:
            break
    return best


def _steps(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 11, 16, … up to `most`."""
    steps = {round(2 ** (i / 2)) for i in range(2 * most.bit_length())} | {most}
    return sorted(k for k in steps if k <= most)
