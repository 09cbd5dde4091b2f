"""Where a product of factors f = M_1 ⋯ M_k starts: at full width, in the compressed form, or from the spectrum.

Source: Yaras, Wang, Balzano and Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation",
arXiv 2406.04112, equation 3 and section 2.3. A product is a list of matrices from left to right, W_L first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.completion.entries import Dense, Entries
from rankwise.linalg.subspace import gradient_subspace, paired_subspaces, signed_permutation
from rankwise.linalg.svd import leading_triplets_full
from rankwise.update import Factors

SMALL = 300
"""A dense matrix with a side up to this is decomposed in full."""
SWEEPS = 6
"""Subspace iterations of a spectral start, which need not converge."""
EXTRA = 8
"""Columns beside those asked for."""


def leading(entries: Entries, r: int, *, seed: int) -> Factors:
    """About the r leading singular triplets of Ω ⊙ M: exact for a small dense matrix, by subspace iteration else."""
    if isinstance(entries, Dense) and min(entries.shape) <= SMALL:
        return leading_triplets_full(entries.data, r).factors
    m, n = entries.shape
    generator = torch.Generator(device="cpu").manual_seed(seed)
    sketch = torch.randn(n, min(m, n, r + EXTRA), generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(entries.times(entries.data, sketch.to(entries.data))).Q
    for _ in range(SWEEPS):
        Z = torch.linalg.qr(entries.transposed_times(entries.data, Q)).Q
        Q = torch.linalg.qr(entries.times(entries.data, Z)).Q
    V, S, Uh = torch.linalg.svd(entries.transposed_times(entries.data, Q), full_matrices=False)
    return Factors(Q @ Uh[:r].mT, S[:r], V[:, :r].mT)


def spectral_start(entries: Entries, r: int, depth: int, scale: float, *, seed: int) -> list[Tensor]:
    """U, W_L = … = W_1 = ε·I (r, r) and Vᵀ, with U and V the leading singular vectors of Ω ⊙ M."""
    U, _, Vh = leading(entries, r, seed=seed)
    return [U, *_scaled_identities(U, depth, scale), Vh]


def compressed_start(entries: Entries, r: int, depth: int, scale: float, *, seed: int) -> list[Tensor]:
    """U, W_L = … = W_1 = ε·I (r, r) and Vᵀ that follow the full-width product of the same seed (eq. 8)."""
    if isinstance(entries, Dense):
        U, V = gradient_subspace(entries.data, r, seed=seed)
    else:
        U_G, _, Vh_G = leading(entries, (r + 1) // 2, seed=seed)
        U, V = paired_subspaces(U_G, Vh_G.mT, r, least=torch.finfo(U_G.dtype).eps ** 0.5, seed=seed)
    return [U, *_scaled_identities(U, depth, scale), V.mT]


def full_start(shape: tuple[int, int], depth: int, scale: float, *, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """W_L, …, W_1 of width d = max(m, n) with W_l(0) = ε·(semi-)orthogonal (eq. 3): random but for their product.

    That is ε^L·S, S the signed permutation of the seed, as `compressed_start` takes it to be.
    """
    m, n = shape
    d, generator = max(m, n), torch.Generator(device="cpu").manual_seed(seed)
    inner = [torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q for _ in range(depth - 1)]
    S = signed_permutation(m, n, seed=seed)
    if m <= n:  # W_L closes the product: W_L = S·(W_{L−1} ⋯ W_1)ᵀ
        closing = S.apply(_product(inner).mT) if inner else S.apply(torch.eye(n, dtype=torch.float64))
        chain = [closing, *inner]
    else:  # W_1 = (W_L ⋯ W_2)ᵀ·S = (Sᵀ·(W_L ⋯ W_2))ᵀ
        closing = S.mT.apply(_product(inner) if inner else torch.eye(m, dtype=torch.float64)).mT
        chain = [*inner, closing]
    return [(scale * factor).to(dtype) for factor in chain]


def _product(chain: list[Tensor]) -> Tensor:
    return torch.linalg.multi_dot(chain) if len(chain) > 1 else chain[0]


def _scaled_identities(like: Tensor, depth: int, scale: float) -> list[Tensor]:
    return [scale * torch.eye(like.shape[1], dtype=like.dtype, device=like.device) for _ in range(depth)]
