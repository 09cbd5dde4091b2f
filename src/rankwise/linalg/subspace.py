"""The subspaces in which a deep product of full-width layers learns, known from one gradient before it starts.

Source: Yaras, Wang, Balzano and Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation",
arXiv 2406.04112, section 2.3 and theorem 2.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.linalg.svd import leading_triplets, leading_triplets_full
from rankwise.precision import exact

SMALL = 256
"""A gradient with a side up to this is decomposed in full: exact, and as quick as a sketch."""


class SignedPermutation(NamedTuple):
    """A semi-orthogonal S (out, in) with one ±1 in each line of its shorter side, in O(out + in) memory.

    S Sᵀ = I for out ≤ in and SᵀS = I for out ≥ in. Shapes: rows, columns and signs (min(out, in),), whole numbers.
    """

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    signs: Tensor

    @property
    def mT(self) -> SignedPermutation:
        """Sᵀ (in, out)."""
        return SignedPermutation((self.shape[1], self.shape[0]), self.columns, self.rows, self.signs)

    def apply(self, X: Tensor) -> Tensor:
        """S X (out, k) of X (in, k), in the dtype of X."""
        result = X.new_zeros(self.shape[0], X.shape[1])
        result[self.rows] = X[self.columns] * self.signs.to(X.dtype)[:, None]
        return result


def signed_permutation(out: int, inner: int, *, seed: int = 0, device: torch.device | str = "cpu") -> SignedPermutation:
    """The signed permutation S (out, inner) of a seed; for out ≠ inner the one of (inner, out) is Sᵀ.

    It stands for W_L(0) ⋯ W_1(0)/ε^L of full-width orthogonal layers. The identity would not do: from ε·I no product
    reaches a symmetric negative target, since each eigenvalue would have to cross 0, where its gradient vanishes.
    """
    if out > inner:
        return signed_permutation(inner, out, seed=seed, device=device).mT
    generator = torch.Generator(device="cpu").manual_seed(seed)
    columns = torch.randperm(inner, generator=generator)[:out]
    signs = 1 - 2 * torch.randint(0, 2, (out,), generator=generator)
    return SignedPermutation((out, inner), torch.arange(out, device=device), columns.to(device), signs.to(device))


def gradient_subspace(G: Tensor, r: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The bases U, V between which ΔW = U · W_L ⋯ W_1 · Vᵀ, W_l(0) = ε·I (r, r), follows the full-width product (8).

    With S = `signed_permutation(out, in, seed=seed)` and U_G, V_G the r/2 leading singular vectors of G:
    out ≤ in: V = orth[V_G, Sᵀ U_G] and U = S·V; out > in: U = orth[U_G, S V_G] and V = Sᵀ·U.
    The derived factor must stay as it is: column by column the image of the other, of norm ≤ 1, orthonormal for
    out = in only. Another basis of its span (QR, SVD) is paired differently and learns another way, or nothing.
    For out = in and rank(G) ≤ r/2 training never leaves U and V (theorem 2.1); off the square nearly so.

    Directions that G does not have (rank(G) < r/2) or that V_G and Sᵀ U_G share are replaced by seeded random ones.
    An odd r takes its last column from one more triplet: v − Sᵀu, along which S·h·hᵀ descends whatever the sign of G.

    Args:
        G: the gradient of one layer's weight (out, in), finite.
        r: how many columns, 1 ≤ r ≤ min(out, in).
        seed: of S and of the completion; the same gradient and seed give the same bases.

    Returns:
        U (out, r) and V (in, r), of G's dtype but at least float32. Nothing larger than G is formed.
    """
    if G.shape[0] > G.shape[1]:
        V, U = gradient_subspace(G.mT, r, seed=seed)
        return U, V
    G = _of_ordinary_size(G.to(torch.promote_types(G.dtype, torch.float32)))
    u, v = _leading_vectors(G, (r + 1) // 2, seed)
    U, V = paired_subspaces(u, v, r, least=torch.finfo(G.dtype).eps ** 0.5, seed=seed)
    return U.to(G.dtype), V.to(G.dtype)


def paired_subspaces(u: Tensor, v: Tensor, r: int, *, least: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The bases U (out, r), V (in, r) of `gradient_subspace` from the ⌈r/2⌉ leading singular vectors u, v of G.

    Vectors that G does not have are 0; what lies within `least` of the others counts as not there.
    """
    if len(u) > len(v):
        V, U = paired_subspaces(v, u, r, least=least, seed=seed)
        return U, V
    S = signed_permutation(len(u), len(v), seed=seed, device=u.device)
    image, pairs = S.mT.apply(u), r // 2
    candidates = torch.cat([v[:, :pairs], image[:, :pairs], (v - image)[:, pairs:]], dim=1)
    V = _completed(candidates, least, seed)
    return S.apply(V), V


def _of_ordinary_size(G: Tensor) -> Tensor:
    """G or, where squares of its entries might overflow or vanish, a multiple of it."""
    largest = float(torch.linalg.vector_norm(G, torch.inf))
    return G if largest == 0 or 1e-12 < largest < 1e12 else G / largest


def _leading_vectors(G: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """The k leading left and right singular vectors (out, k), (in, k), zero where the singular value is rounding."""
    smaller = min(G.shape)
    full = smaller <= SMALL or 4 * k >= smaller
    B, s, A = (leading_triplets_full(G, k) if full else leading_triplets(G, k, seed=seed)).factors
    present = s > 10 * torch.finfo(G.dtype).eps * s[0]
    return exact(B * present), exact(A.mT * present)


def _completed(candidates: Tensor, least: float, seed: int) -> Tensor:
    """An orthonormal basis (d, r) of r candidates, those within `least` of the ones before replaced by random ones."""
    R = torch.linalg.qr(candidates, mode="r").R
    kept = candidates[:, R.diagonal().abs() > least]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    missing = candidates.shape[1] - kept.shape[1]
    drawn = torch.randn(len(kept), missing, generator=generator, dtype=torch.float64).to(kept)
    return torch.linalg.qr(torch.cat([kept, drawn], dim=1)).Q
