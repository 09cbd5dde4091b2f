"""The rank of a completion: where its singular values break off, else where held-out entries are met best.

Of held-out entries two things are asked, since real matrices seldom break off: how many ranks, and how much ridge λ of
½λ(‖P‖² + ‖Q‖²), that is λ‖X‖_*, they are held by. A ridge must be worth it: it shrinks what is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from rankwise.completion.entries import Entries
from rankwise.completion.polish import Fit, polish
from rankwise.completion.watch import relative_error

CLEAR = 10.0
"""A ratio of successive singular values from which on the gap between them is taken for the rank."""
FAINT = 1e-3
"""Relative floor: singular values below this share of the largest are left over from initialisation."""
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""λ in units of the share observed, the matrix having a spectral norm of about 1."""
HELD = 16
"""Ranks among which a ridge is chosen, before more are tried with it."""
BETTER = 0.99
"""What the held-out error must fall to for more ranks or a ridge to be preferred."""
TRIES = 30
"""Iterations of alternating least squares that a choice is judged by."""


class Choice(NamedTuple):
    """Ranks, ridge as a multiple of the share observed, and the relative error of held-out entries with them."""

    rank: int
    ridge: float
    error: float


def break_off(S: Tensor, most: int) -> tuple[int, float]:
    """The k ≤ `most` of the largest ratio σ_k/σ_{k+1} of falling singular values, and the ratio; faint ones alike."""
    tail = S[1 : most + 1].clamp_min(FAINT * S[0])
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
    share, ranks = train.count / (train.shape[0] * train.shape[1]), _steps(P.shape[1])

    def tried(P: Tensor, Q: Tensor, ridge: float) -> tuple[Choice, Fit]:
        fit = polish(train, P, Q, center=center, tol=1e-4, max_iter=TRIES, ridge=ridge * share)
        return Choice(P.shape[1], ridge, relative_error(held, fit.P, fit.Q, fit.offset)), fit

    def grown(best: Choice, ranks: Iterable[int]) -> Choice:
        """With more ranks, until two numbers of them in a row are no better."""
        worse = 0
        for k in ranks:
            found, _ = tried(P[:, :k], Q[:, :k], best.ridge)
            worse = 0 if found.error < BETTER * best.error else worse + 1
            best = best if worse else found
            if worse == 2:
                break
        return best

    free = grown(Choice(0, 0.0, 1.0), sorted({*ranks, min(also, P.shape[1])}))
    k = min(HELD, P.shape[1])
    fits, start = [], (P[:, :k], Q[:, :k])
    for ridge in RIDGES:  # each from where a smaller one ended: what one has shrunk grows back slowly
        found, fit = tried(*start, ridge)
        fits.append(found)
        start = fit.P, fit.Q
        if len(fits) > 2 and fits[-1].error > fits[-2].error > fits[-3].error:
            break
    held_by = min(fits, key=lambda found: found.error)
    held_by = grown(held_by, [more for more in ranks if more > k])
    return held_by if held_by.error < BETTER * free.error else free


def _steps(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 11, 16, … up to `most`."""
    steps = {round(2 ** (i / 2)) for i in range(2 * most.bit_length())} | {most}
    return sorted(k for k in steps if k <= most)
