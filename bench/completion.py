"""Matrix completion, in errors and seconds: `python bench/completion.py`, parts of it with `--only`.

width    compressed against full width at d = 1000, gradient descent to the same training error, start included
small    against scikit-learn's IterativeImputer and SoftImpute, on planted and on real matrices
large    10 million entries of a 100,000 by 20,000 matrix in a process of its own, against alternating least squares
         that are told the rank
steps    seconds of a loss and its gradient by entries and ranks

Errors are relative, of the entries that were not shown. scikit-learn carries the image and the digits; gene expression
is the matrix inside the package scanpy (`pip install --no-deps scanpy==1.11.5 && pip install h5py`), left out without.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import in_turns, machine, options, write
from scipy import sparse
from sklearn.datasets import load_digits, load_sample_image
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer

from rankwise.completion import DeepMatrixCompletion, DeepMatrixFactorization
from rankwise.completion.descent import descent
from rankwise.completion.entries import Dense, Sparse
from rankwise.completion.misfit import misfit
from rankwise.completion.polish import polish
from rankwise.completion.standard import standardised
from rankwise.completion.starts import compressed_start, full_start, leading

LAMBDAS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
"""SoftImpute's thresholds, as shares of the spectral norm of what is seen; the best is chosen by held-out entries."""


def planted(m: int, n: int, r: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, r)) @ rng.normal(size=(r, n))


def width(repeats: int) -> list[dict[str, Any]]:
    """Full observation through the estimators; 30 % of the entries through the gradient descent that they run."""
    d, r, scale, target = 1000, 5, 0.05, 1e-2
    M = planted(d, d, r)
    shared = {"rank": r, "init_scale": scale, "tol": target, "random_state": 0}
    mask = torch.rand(d, d, generator=torch.Generator().manual_seed(0)) < 0.3
    seen, _ = standardised(Dense(torch.from_numpy(M) * mask, mask.double()), center=False, seed=0)

    def complete(full: bool) -> int:
        if full:
            chain = full_start((d, d), 3, scale, seed=0, dtype=torch.float64)
        else:
            chain = compressed_start(seen, 2 * r, 3, scale, seed=0)
        whole = float(seen.data.norm())
        walk = descent(seen, chain, rate=1 / (3 * 0.3), outer_ratio=None if full else 1.0)
        return next(step for step, (_, loss) in enumerate(walk) if (2 * loss) ** 0.5 <= target * whole)

    rows = []
    for what, ways in {
        "factorisation": {
            "full": lambda: DeepMatrixFactorization(width="full", **shared).fit(M).n_iter_,
            "compressed": lambda: DeepMatrixFactorization(**shared).fit(M).n_iter_,
        },
        "completion, 30 % seen": {"full": lambda: complete(True), "compressed": lambda: complete(False)},
    }.items():
        steps: dict[str, int] = {}
        times = in_turns({n: lambda n=n, w=w, s=steps: s.update({n: w()}) for n, w in ways.items()}, repeats)
        seconds = {name: statistics.median(found) for name, found in times.items()}
        row = {"what": what, "d": d, "r": r, "to": target, "steps": steps, "seconds": seconds}
        rows.append(row | {"times faster": seconds["full"] / seconds["compressed"]})
        print(row["what"], {n: round(s, 2) for n, s in seconds.items()}, steps, f"{rows[-1]['times faster']:.1f} ×")
    return rows


def matrices() -> Iterator[tuple[str, np.ndarray]]:
    yield "planted, rank 3, 200 × 100", planted(200, 100, 3)
    yield (
        "planted, rank 3, 5 % noise",
        planted(200, 100, 3) + 0.05 * 3**0.5 * np.random.default_rng(1).normal(size=(200, 100)),
    )
    yield "digits, 1797 × 64", load_digits().data
    yield "image (china), 427 × 640", load_sample_image("china.jpg").mean(2)
    genes = gene_expression()
    if genes is not None:
        yield f"gene expression, {genes.shape[0]} × {genes.shape[1]}", genes


def gene_expression() -> np.ndarray | None:
    """Cells by genes of the reduced PBMC data inside scanpy."""
    package, reader = importlib.util.find_spec("scanpy"), importlib.util.find_spec("h5py")
    if package is None or reader is None or package.origin is None:
        return None
    import h5py  # noqa: PLC0415  only where it is

    with h5py.File(Path(package.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad") as file:
        return np.asarray(file["X"], dtype=np.float64)


def masks(shape: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Half seen, a fifth seen, and a fifth with rows and columns seen by a power law."""
    rng = np.random.default_rng(0)
    for share in (0.5, 0.2):
        yield f"{share:.0%}", rng.random(shape) < share
    weights = np.outer(*(rng.permutation(np.arange(1, side + 1)) ** -0.5 for side in shape))
    yield "20%, uneven", rng.random(shape) < np.minimum(1, weights * 0.2 / weights.mean())


def soft_impute(X: np.ndarray) -> np.ndarray:
    """Mazumder, Hastie and Tibshirani (2010): X ← shrink(Ω ⊙ M + Ω̄ ⊙ X), the threshold by a tenth held out."""
    seen = np.isfinite(X)
    center = np.nanmean(X)
    held = seen & (np.random.default_rng(0).random(X.shape) < 0.1)
    data = np.where(seen, X - center, 0)
    largest = np.linalg.norm(data, 2)

    def path(mask: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
        filled = np.zeros_like(data)
        for share in LAMBDAS:
            for _ in range(200):
                U, S, Vh = np.linalg.svd(np.where(mask, data, filled), full_matrices=False)
                new = (U * np.maximum(S - share * largest, 0)) @ Vh
                change, filled = np.linalg.norm(new - filled), new
                if change <= 1e-4 * np.linalg.norm(new):
                    break
            yield share, filled

    best = min(path(seen & ~held), key=lambda found: np.linalg.norm((found[1] - data)[held]))[0]
    return next(found for share, found in path(seen) if share == best) + center


def imputed(X: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        features = min(X.shape[1], 50)
        model = IterativeImputer(n_nearest_features=features, random_state=0, keep_empty_features=True)
        return model.fit_transform(X)


def small(_: int) -> list[dict[str, Any]]:
    def ours(X: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DeepMatrixCompletion(random_state=0).fit_transform(X)

    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "rankwise": ours,
        "SoftImpute": soft_impute,
        "IterativeImputer": imputed,
    }
    rows = []
    for name, M in matrices():
        for how, mask in masks(M.shape):
            X = np.where(mask, M, np.nan)
            row: dict[str, Any] = {"matrix": name, "seen": how}
            for way, complete in ways.items():
                began = time.perf_counter()
                error = np.linalg.norm((complete(X) - M)[~mask]) / np.linalg.norm(M[~mask])
                row[way] = {"error": float(error), "seconds": time.perf_counter() - began}
            rows.append(row)
            told = (f"{way} {row[way]['error']:.2e} in {row[way]['seconds']:.1f} s" for way in ways)
            print(f"{name}, {how}: " + ", ".join(told), flush=True)
    return rows


def triplets(m: int, n: int, r: int, count: int, noise: float) -> tuple[sparse.coo_array, sparse.coo_array]:
    """Entries of a planted matrix with noise to fit, and a tenth as many without noise to judge by; none twice."""
    rng = np.random.default_rng(0)
    places = np.unique(rng.integers(0, m * n, size=count + count // 8))
    places = rng.permutation(places)[: count + count // 10]
    rows, columns = np.divmod(places, n)
    P, Q = rng.normal(size=(m, r)), rng.normal(size=(n, r))
    values = np.einsum("ij,ij->i", P[rows], Q[columns])
    seen, kept = slice(count), slice(count, None)
    shown = values[seen] + noise * r**0.5 * rng.normal(size=count)
    fit = sparse.coo_array((shown, (rows[seen], columns[seen])), shape=(m, n))
    return fit, sparse.coo_array((values[kept], (rows[kept], columns[kept])), shape=(m, n))


def large_in_its_own_process(count: int, threads: int, results: Any) -> None:
    torch.set_num_threads(threads)
    fit, kept = triplets(100_000, 20_000, 5, count, 0.1)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    model = DeepMatrixCompletion(20, random_state=0).fit(fit)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = model.entries(*kept.coords)
    error = float(np.linalg.norm(told - kept.data) / np.linalg.norm(kept.data))

    began = time.perf_counter()
    rows, columns = (torch.from_numpy(at.astype(np.int64)) for at in fit.coords)
    data, units = standardised(Sparse(rows, columns, torch.from_numpy(fit.data), fit.shape), center=True, seed=0)
    U, S, Vh = leading(data, 5, seed=0)
    least = polish(data, U * S.sqrt(), Vh.mT * S.sqrt(), center=True, tol=1e-6, max_iter=100)
    i, j = (torch.from_numpy(at.astype(np.int64)) for at in kept.coords)
    found = units.scale * ((least.P[i] * least.Q[j]).sum(1) + least.offset) + units.offset
    told_error = float(np.linalg.norm(found.numpy() - kept.data) / np.linalg.norm(kept.data))
    results.put(
        {
            "entries": count,
            "rank asked": 20,
            "rank found": model.rank_,
            "iterations": model.n_iter_,
            "seconds": seconds,
            "error": error,
            "peak MiB": peak / 1024,
            "of which data MiB": base / 1024,
            "least squares told the rank": {"error": told_error, "seconds": time.perf_counter() - began},
        }
    )


def large(_: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=large_in_its_own_process, args=(10_000_000, torch.get_num_threads(), results))
    process.start()
    row = results.get()
    process.join()
    print(row)
    return [row]


def steps(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for count in (2_000_000, 10_000_000):
        fit, _ = triplets(100_000, 20_000, 5, count, 0.1)
        i, j = (torch.from_numpy(at.astype(np.int64)) for at in fit.coords)
        data = Sparse(i, j, torch.from_numpy(fit.data), fit.shape)
        ways = {}
        for r in (5, 10, 20, 40):
            P, Q = (torch.randn(side, r, dtype=torch.float64, requires_grad=True) for side in fit.shape)
            ways[str(r)] = lambda P=P, Q=Q, data=data: misfit(data, P, Q, center=True).backward()
        for r, found in in_turns(ways, repeats).items():
            seconds = statistics.median(found)
            row = {
                "entries": count,
                "r": int(r),
                "seconds": seconds,
                "ns per entry and rank": 1e9 * seconds / count / int(r),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


PARTS = {"width": width, "small": small, "large": large, "steps": steps}


def main() -> None:
    parser = options(__doc__, repeats=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    write(given.json, {part: PARTS[part](given.repeats) for part in given.only})


if __name__ == "__main__":
    main()
