"""What is written down of an adapter at one step of its training: its spectra, layer by layer, and what they amount to.

A record is a JSON file of numbers, and beside it the leading singular vectors of each layer in a safetensors file, from
which the alignment with any other step follows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rankwise.checks import require_int
from rankwise.errors import DataError
from rankwise.files import write_bytes_whole, write_whole
from rankwise.spectral.alignment import pretrained_lengths
from rankwise.spectral.condition import condition_numbers
from rankwise.spectral.drift import Pretrained
from rankwise.spectral.rank import effective_rank, numerical_rank, stable_rank, subspace_use
from rankwise.spectral.stacks import stacked, stacks_of
from rankwise.update import Factors

FORMAT = 1
"""Version of the files. A record of another version is refused, not guessed at."""


DIRECTIONS = 4
"""Leading singular directions of each layer that are kept by default, to tell how subspaces turn."""


class _Strict(BaseModel):
    """No unknown entries, and unchangeable once made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PretrainedRecord(_Strict):
    """One layer's update beside its pretrained weight W0."""

    norm: float
    """‖W0‖_F."""
    lengths: list[float]
    """|u_iᵀ W0 v_i| along the singular directions of the update; see `pretrained_lengths`."""
    top_k: int
    """How many leading triplets of the weight the drift is over."""
    drift_values: float
    """ΔΣ_t (eq. 1), in the units of W0."""
    drift_vectors: float
    """ΔD_t (eq. 4), in [0, 1]."""


class LayerRecord(_Strict):
    """One layer's update at one step."""

    shape: tuple[int, int]
    """(out, in) of the weight."""
    rank: int
    """Of the tensors."""
    kept: int
    """What the method has not pruned."""
    singular_values: list[float]
    """The min(r, out, in) leading ones of ΔW, falling."""
    numerical_rank: int
    effective_rank: float
    stable_rank: float
    subspace_use: float
    """‖ΔW‖_* / (√r·‖ΔW‖_F), in [1/√r, 1], or 0."""
    subspace_use_of_factor: float
    """‖A‖_* / (√r·‖A‖_F): the two sides of NNM-LoRA's eq. 11."""
    condition_of_product: float | None
    """κ(W_p) = σ_1/σ_r of the trained product; None: infinite, or of no update."""
    condition_of_left: float | None
    """κ(U_p), of the left factor."""
    condition_of_right: float | None
    """κ(V_p), of the right factor."""
    gates: list[float]
    """The diagonal s of ΔW = B·diag(s)·A as trained: gates, SORSA's and AdaLoRA's values; in LoRA its scale."""
    pretrained: PretrainedRecord | None = None

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return math.hypot(*self.singular_values)


class Record(_Strict):
    """An adapter at one step of its training."""

    format: int = FORMAT
    step: int
    """Optimiser steps done."""
    method: str
    budget: float | None = None
    """Ranks over all layers that the method's schedule allows at this step; None for a method without one."""
    modules: dict[str, LayerRecord]
    """By module name in the base model, in model order."""


class Directions(NamedTuple):
    """The leading singular directions of one layer's update: U (out, k) and V (in, k), orthonormal columns."""

    U: Tensor
    V: Tensor


class Measured(NamedTuple):
    """What one look at an adapter found."""

    record: Record
    directions: dict[str, Directions]


def measure(
    updates: Mapping[str, Factors],
    *,
    step: int,
    method: str,
    kept: Mapping[str, int],
    ranks: Mapping[str, int] | None = None,
    trained: Mapping[str, Factors] | None = None,
    budget: float | None = None,
    pretrained: Mapping[str, Pretrained] | None = None,
    directions: int = 0,
) -> Measured:
    """The record of an adapter, from its factors alone.

    All layers of one shape are decomposed at once: two QR decompositions and an r × r SVD, never a dense ΔW.

    Args:
        updates: one layer's Factors by module name: B (out, r), s (r,), A (r, in).
        step: optimiser steps done, ≥ 0.
        method: the method's name.
        kept: ranks that the method has not pruned, by module name.
        ranks: of the tensors, by module name, where updates come without ranks that hold nothing. None: of the updates.
        trained: what the method trains where that is not the update itself (SORSA: U_p, S_p, V_p without its start):
            condition numbers and gates are its. None: the updates.
        budget: ranks that a schedule allows at this step.
        pretrained: the pretrained weights to measure against, by module name; modules without one are left out there.
        directions: how many leading singular directions of each layer to return.

    Raises:
        ArgumentError: the step is negative, or a factor holds a NaN or infinity; the message names the layer.

    >>> update = Factors(torch.eye(5, 3), torch.tensor([4.0, 4.0, 0.0]), torch.eye(3, 6))
    >>> found = measure({"query": update}, step=10, method="lora", kept={"query": 3})
    >>> layer = found.record.modules["query"]
    >>> layer.singular_values, layer.numerical_rank, layer.stable_rank, round(layer.subspace_use, 4)
    ([4.0, 4.0, 0.0], 2, 2.0, 0.8165)
    """
    require_int("step", step, least=0)
    weights = pretrained or {}
    found: dict[str, dict[str, object]] = {name: {"rank": f.r, "kept": kept[name]} for name, f in updates.items()}
    for name, rank in (ranks or {}).items():
        found[name]["rank"] = rank
    leading: dict[str, Directions] = {}
    for names in stacks_of(updates):
        thin = stacked("updates", names, updates).orthogonal()
        columns = _of_updates(thin)
        for place, name in enumerate(names):
            own = Factors(*(t[place] for t in thin))
            found[name] |= {column: values[place] for column, values in columns.items()}
            found[name]["shape"] = (own.B.shape[0], own.A.shape[1])
            if name in weights:
                found[name]["pretrained"] = _beside_pretrained(weights[name], own)
            if directions:
                # Copies: a slice would keep the whole stack alive.
                leading[name] = Directions(own.B[:, :directions].clone(), own.A[:directions].mT.clone())
    trained = updates if trained is None else trained
    for names in stacks_of(trained):
        columns = _of_trained(stacked("trained", names, trained))
        for place, name in enumerate(names):
            found[name] |= {column: values[place] for column, values in columns.items()}
    modules = {name: LayerRecord.model_validate(numbers) for name, numbers in found.items()}
    return Measured(Record(step=step, method=method, budget=budget, modules=modules), leading)


def _of_updates(thin: Factors) -> dict[str, list[object]]:
    """What is measured of each update of a stack, from its decomposition, by the names of `LayerRecord`."""
    S = thin.s
    larger_side = max(thin.B.shape[-2], thin.A.shape[-1])
    return {
        "singular_values": S.tolist(),
        "numerical_rank": numerical_rank(S, larger_side).tolist(),
        "effective_rank": effective_rank(S).tolist(),
        "stable_rank": stable_rank(S).tolist(),
        "subspace_use": subspace_use(S).tolist(),
    }


def _of_trained(trained: Factors) -> dict[str, list[object]]:
    """What is measured of each layer's trained factors, by the names of `LayerRecord`."""
    conditions = condition_numbers(trained)
    # The singular values of A are those of the small triangle of its QR decomposition.
    values_of_A = torch.linalg.svdvals(torch.linalg.qr(trained.A.mT, mode="r").R)
    return {
        "subspace_use_of_factor": subspace_use(values_of_A).tolist(),
        "condition_of_product": _finite_or_none(conditions.W),
        "condition_of_left": _finite_or_none(conditions.U),
        "condition_of_right": _finite_or_none(conditions.V),
        "gates": trained.s.tolist(),
    }


def _finite_or_none(values: Tensor) -> list[object]:
    """JSON has no infinity and no NaN."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _beside_pretrained(weight: Pretrained, thin: Factors) -> PretrainedRecord:
    drift = weight.drift(thin)
    return PretrainedRecord(
        norm=float(torch.linalg.vector_norm(weight.W0)),
        lengths=pretrained_lengths(weight.W0, thin).tolist(),
        top_k=weight.k,
        drift_values=float(drift.values),
        drift_vectors=float(drift.vectors),
    )


# --- files ----------------------------------------------------------------------------------------------------------


def write_record(folder: Path, measured: Measured) -> Path:
    """Write a record, whole or not at all; one of the same step is replaced.

    Args:
        folder: where records of one adapter lie; made where it is missing.
        measured: what to write.

    Returns:
        The JSON file. Directions are beside it in float16, which an alignment of unit vectors does not notice.

    >>> import tempfile
    >>> update = Factors(torch.eye(5, 3), torch.tensor([4.0, 2.0, 1.0]), torch.eye(3, 6))
    >>> found = measure({"query": update}, step=10, method="lora", kept={"query": 3}, directions=2)
    >>> write_record(Path(tempfile.mkdtemp()), found).name
    'step-00000010.json'
    """
    file = folder / f"step-{measured.record.step:08d}.json"
    if measured.directions:
        tensors = {
            f"{name}.{side}": t.to(device="cpu", dtype=torch.float16).contiguous()
            for name, found in measured.directions.items()
            for side, t in zip("UV", found, strict=True)
        }
        write_bytes_whole(file.with_suffix(".safetensors"), save(tensors))
    # The JSON file last: where it is, the record is whole.
    write_whole(file, measured.record.model_dump_json())
    return file


def record_files(folder: Path) -> list[Path]:
    """The records in a folder, in the order of their steps."""
    return sorted(folder.glob("step-*.json"))


def read_record(file: Path) -> Measured:
    """One record, with the directions beside it, in float64.

    Raises:
        DataError: a file is broken, or of another format.

    >>> import tempfile
    >>> update = Factors(torch.eye(5, 3), torch.tensor([4.0, 2.0, 1.0]), torch.eye(3, 6))
    >>> found = measure({"query": update}, step=10, method="lora", kept={"query": 3}, directions=2)
    >>> again = read_record(write_record(Path(tempfile.mkdtemp()), found))
    >>> again.record == found.record, tuple(again.directions["query"].V.shape)
    (True, (6, 2))
    """
    try:
        record = Record.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{file} is no whole record of an adapter ({type(error).__name__})") from error
    if record.format != FORMAT:
        raise DataError(f"{file} is a record of format {record.format}, and this rankwise reads format {FORMAT}")
    beside = file.with_suffix(".safetensors")
    if not beside.is_file():
        return Measured(record, {})
    try:
        tensors = {key: t.double() for key, t in load_file(beside).items()}
        directions = {name: Directions(tensors[f"{name}.U"], tensors[f"{name}.V"]) for name in record.modules}
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{beside} is no whole file of directions ({type(error).__name__})") from error
    return Measured(record, directions)
