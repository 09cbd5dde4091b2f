"""Matrices of known rank, seen in part."""

from __future__ import annotations

import numpy as np


def planted(
    m: int, n: int, r: int, seen: float, seed: int, *, noise: float = 0.0, offset: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """M (m, n) of rank r plus `offset` standard deviations, and M with noise and NaN where it is not seen."""
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(m, r)) @ rng.normal(size=(r, n))
    M = M + offset * M.std()
    N = M + noise * M.std() * rng.normal(size=M.shape)
    return M, np.where(rng.random(M.shape) < seen, N, np.nan)


def relative_error(found: np.ndarray, M: np.ndarray) -> float:
    """‖X − M‖_F/‖M‖_F."""
    return float(np.linalg.norm(found - M) / np.linalg.norm(M))
