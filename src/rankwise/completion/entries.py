"""The observed entries Ω of a matrix M, and what a fit needs of them: products on Ω, never the dense matrix.

`Dense` holds M with zeros where nothing is seen, and suits an array that its user has formed already. `Sparse` holds
the entries by rows and by columns: a product costs their number times the width. Both answer alike, and what they call
"values", numbers on Ω, is opaque: an (m, n) tensor that is 0 off Ω, or one number per entry.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Numbers that the way without sparse kernels forms at a time."""


class Entries(Protocol):
    """Observed entries of an (m, n) matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        ...

    @property
    def data(self) -> Tensor:
        """The values of M."""
        ...

    @property
    def ones(self) -> Tensor:
        """The values that are 1 on Ω."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    @property
    def mT(self) -> Entries:
        """Those of Mᵀ."""
        ...

    def at(self, P: Tensor, Q: Tensor) -> Tensor:
        """The values of P·Qᵀ on Ω, of P (m, k) and Q (n, k)."""
        ...

    def times(self, values: Tensor, X: Tensor) -> Tensor:
        """The matrix of these values, zero off Ω, times X (n, k)."""
        ...

    def transposed_times(self, values: Tensor, Y: Tensor) -> Tensor:
        """The transpose of the matrix of these values times Y (m, k)."""
        ...

    def counts(self) -> Tensor:
        """How many entries each row has, (m,)."""
        ...

    def with_data(self, data: Tensor) -> Entries:
        """Other values on the same Ω."""
        ...

    def part(self, chosen: Tensor) -> Entries:
        """Those of the `count` entries, by rows, that a mask (count,) chooses."""
        ...

    def rows(self, block: slice) -> Entries:
        """Those of some rows that follow each other."""
        ...

    def fill(self, X: Tensor) -> Tensor:
        """X (m, n) with M where it is observed; X may be changed."""
        ...

    def to(self, device: torch.device) -> Entries:
        """The same, there."""
        ...

    def exact(self) -> Entries:
        """The same in float64."""
        ...


@dataclass(frozen=True)
class Dense:
    """Entries as an (m, n) matrix with zeros off Ω, and a matrix of ones and zeros."""

    data: Tensor
    ones: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.data.shape[0], self.data.shape[1]

    @property
    def count(self) -> int:
        """How many there are."""
        return self._count

    @cached_property
    def _count(self) -> int:
        return int(self.ones.count_nonzero())

    @property
    def mT(self) -> Dense:
        """Those of Mᵀ."""
        return Dense(self.data.mT, self.ones.mT)

    def at(self, P: Tensor, Q: Tensor) -> Tensor:
        """The values of P·Qᵀ on Ω."""
        return (P @ Q.mT).mul_(self.ones)

    def times(self, values: Tensor, X: Tensor) -> Tensor:
        """values · X."""
        return values @ X

    def transposed_times(self, values: Tensor, Y: Tensor) -> Tensor:
        """valuesᵀ · Y."""
        return values.mT @ Y

    def counts(self) -> Tensor:
        """How many entries each row has."""
        return self.ones.sum(1)

    def with_data(self, data: Tensor) -> Dense:
        """Other values on the same Ω."""
        return Dense(data, self.ones)

    def part(self, chosen: Tensor) -> Dense:
        """Those that a mask (count,) chooses."""
        ones = torch.zeros_like(self.ones).masked_scatter_(self.ones > 0, chosen.to(self.ones.dtype))
        return Dense(self.data * ones, ones)

    def rows(self, block: slice) -> Dense:
        """Those of some rows."""
        return Dense(self.data[block], self.ones[block])

    def fill(self, X: Tensor) -> Tensor:
        """X with M where it is observed."""
        return torch.where(self.ones > 0, self.data, X)

    def to(self, device: torch.device) -> Dense:
        """The same, there."""
        return Dense(self.data.to(device), self.ones.to(device))

    def exact(self) -> Dense:
        """The same in float64."""
        return Dense(self.data.double(), self.ones.double())


class Lines(NamedTuple):
    """Where the entries are, line by line: `starts` (lines + 1,) and `across` (count,), 32-bit as the kernels want."""

    starts: Tensor
    across: Tensor

    @staticmethod
    def of(line: Tensor, across: Tensor, lines: int) -> Lines:
        """Of entries that are sorted by line."""
        starts = torch.zeros(lines + 1, dtype=torch.int64, device=line.device)
        starts[1:] = torch.bincount(line, minlength=lines).cumsum(0)
        return Lines(starts.int(), across.int())

    def each(self) -> Tensor:
        """The line of each entry."""
        return torch.repeat_interleave(
            torch.arange(len(self.starts) - 1, device=self.starts.device), self.starts.diff()
        )

    def matrix(self, values: Tensor, across: int) -> Tensor:
        """A torch matrix in CSR form."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.starts, self.across, values, (len(self.starts) - 1, across), check_invariants=False
            )


class Sparse:
    """Entries by rows and by columns; values are numbers (count,), by rows.

    Args:
        rows, columns: where the entries are, int64 (count,), each place once, in any order.
        data: what they are, (count,).
        shape: of the matrix.
    """

    def __init__(self, rows: Tensor, columns: Tensor, data: Tensor, shape: tuple[int, int]) -> None:
        order = torch.argsort(rows * shape[1] + columns)
        self._set(Lines.of(rows[order], columns[order], shape[0]), data[order], shape)

    def _set(self, rows: Lines, data: Tensor, shape: tuple[int, int]) -> None:
        self._rows, self.data, self.shape = rows, data, shape
        self.ones = torch.ones_like(data)
        self._transposed: Sparse | None = None

    @cached_property
    def by_column(self) -> Tensor:
        """The entries' order by columns."""
        return torch.argsort(self._rows.across, stable=True)

    @cached_property
    def _columns(self) -> Lines:
        rows, columns = self.places()
        return Lines.of(columns[self.by_column], rows[self.by_column], self.shape[1])

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.data)

    @property
    def mT(self) -> Sparse:
        """Those of Mᵀ, whose values are by its own rows."""
        if self._transposed is None:
            other = self._transposed = object.__new__(Sparse)
            other._set(self._columns, self.data[self.by_column], (self.shape[1], self.shape[0]))
            other._transposed = self
        return self._transposed

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each entry."""
        return self._rows.each(), self._rows.across.long()

    def at(self, P: Tensor, Q: Tensor) -> Tensor:
        """The values of P·Qᵀ on Ω."""
        if _has_kernels(P):
            pattern = self._rows.matrix(self.ones, self.shape[1])
            return torch.sparse.sampled_addmm(pattern, P.contiguous(), Q.contiguous().mT, beta=0.0).values()
        rows, columns = self.places()
        pieces = zip(rows.split(_piece(P)), columns.split(_piece(P)), strict=True)
        return torch.cat([(P[i] * Q[j]).sum(1) for i, j in pieces])

    def times(self, values: Tensor, X: Tensor) -> Tensor:
        """The matrix of these values times X."""
        return _times(self._rows, values, X)

    def transposed_times(self, values: Tensor, Y: Tensor) -> Tensor:
        """The transpose of the matrix of these values times Y."""
        return _times(self._columns, values[self.by_column], Y)

    def counts(self) -> Tensor:
        """How many entries each row has."""
        return self._rows.starts.diff().to(self.data.dtype)

    def with_data(self, data: Tensor) -> Sparse:
        """Other values on the same Ω."""
        other = object.__new__(Sparse)
        other.__dict__ |= self.__dict__ | {"data": data, "_transposed": None}
        return other

    def part(self, chosen: Tensor) -> Sparse:
        """Those that a mask (count,) chooses."""
        rows, columns = self.places()
        return Sparse(rows[chosen], columns[chosen], self.data[chosen], self.shape)

    def rows(self, block: slice) -> Sparse:
        """Those of some rows."""
        first, last = (int(self._rows.starts[at]) for at in (block.start, block.stop))
        lines = Lines(self._rows.starts[block.start : block.stop + 1] - first, self._rows.across[first:last])
        other = object.__new__(Sparse)
        other._set(lines, self.data[first:last], (block.stop - block.start, self.shape[1]))
        return other

    def fill(self, X: Tensor) -> Tensor:
        """X with M where it is observed."""
        X[self.places()] = self.data
        return X

    def to(self, device: torch.device) -> Sparse:
        """The same, there."""
        if self.data.device == device:
            return self
        rows, columns = self.places()
        return Sparse(rows.to(device), columns.to(device), self.data.to(device), self.shape)

    def exact(self) -> Sparse:
        """The same in float64."""
        other = object.__new__(Sparse)
        other._set(self._rows, self.data.double(), self.shape)
        return other


def split(entries: Entries, share: float, *, seed: int) -> tuple[Entries, Entries]:
    """The entries without a random share of them, and that share: at least one of each where there are two."""
    held = min(max(1, round(share * entries.count)), entries.count - 1)
    chosen = torch.zeros(entries.count, dtype=torch.bool)
    chosen[torch.randperm(entries.count, generator=torch.Generator().manual_seed(seed))[:held]] = True
    chosen = chosen.to(entries.data.device)
    return entries.part(~chosen), entries.part(chosen)


def _has_kernels(X: Tensor) -> bool:
    """Whether torch has its sparse kernels for where X lies."""
    return X.device.type in ("cpu", "cuda")


def _times(lines: Lines, values: Tensor, X: Tensor) -> Tensor:
    """The matrix of these values, line by line, times X."""
    if _has_kernels(X):
        return lines.matrix(values, len(X)) @ X.contiguous()
    result = X.new_zeros(len(lines.starts) - 1, X.shape[1])
    pieces = (t.split(_piece(X)) for t in (lines.each(), lines.across.long(), values))
    for line, across, value in zip(*pieces, strict=True):
        result.index_add_(0, line, value[:, None] * X[across])
    return result


def _piece(X: Tensor) -> int:
    """Entries at a time."""
    return max(1, CHUNK // max(1, X.shape[1]))
