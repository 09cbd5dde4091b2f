"""A smaller plain LoRA from a larger one: every module cut optimally, under one rule for all of them.

An update is decomposed by QR of its factors and an SVD of r × r, never of (out, in). With second moments C = E[x xᵀ] of
a layer's inputs, what is kept is best for E‖(ΔW' − ΔW)x‖² = ‖(ΔW' − ΔW)·C^½‖_F²: by Eckart and Young the best ΔW'·C^½
is U·Uᵀ·ΔW·C^½, U being its leading left singular vectors, so ΔW' = U·Uᵀ·ΔW, whatever the rank of C. These U are also
those of B·diag(s)·L for any L with L·Lᵀ = A·C·Aᵀ, which is r × r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.checks import require_choice, require_int, require_number, require_room
from rankwise.errors import ArgumentError
from rankwise.export.adapter import Adapter
from rankwise.export.card import spread, write_card
from rankwise.export.dtypes import check_dtype, chosen_dtype
from rankwise.export.layouts import check_read_back, compact, relative_error, uniform, write
from rankwise.export.names_today import base_at_hand, with_names_of
from rankwise.export.pipeline_lora import PipelineLora, read_any_lora
from rankwise.files import whole_folder
from rankwise.linalg.budget import best_ranks
from rankwise.precision import exact
from rankwise.update import Factors

ROUNDING = 1e-15
"""Share of a module's energy that counts as nothing: what float64 makes of a share like 0.9."""
LAYOUT_FIELDS = ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora")
LAYOUT_FIELDS += ("init_lora_weights", "lora_dropout", "layers_to_transform", "layers_pattern", "inference_mode")


@dataclass(frozen=True)
class ShrinkReport:
    """What a shrinking wrote; every mapping is by module name in the base model."""

    folder: Path
    ranks_before: dict[str, int]
    """As stored, whether every direction is used or not."""
    ranks: dict[str, int]
    """The rank each module kept, 0 for one without an update."""
    parameters_before: int
    """Numbers in the adapter's A and B."""
    parameters: int
    """Numbers in A and B as written, the padding of a uniform layout included."""
    errors: dict[str, float]
    """‖ΔW' − ΔW‖_F / ‖ΔW‖_F of each module, read back from the file."""
    relative_error: float
    """The same over all modules together."""


@torch.no_grad()
def shrink_adapter(
    folder: str | Path,
    out: str | Path,
    *,
    energy: float | None = None,
    budget: float | None = None,
    rank: int | None = None,
    second_moments: Mapping[str, Tensor] | None = None,
    layout: str = "compact",
    base: str | Path | nn.Module | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> ShrinkReport:
    """Write a plain LoRA adapter with the best updates of lower rank: no other of these ranks is nearer.

    min ‖ΔW' − ΔW‖_F², or with second moments E‖(ΔW' − ΔW)x‖²; what is lost is Σ σ² of the directions left out.

    Args:
        folder: a plain LoRA adapter of anybody's, with rsLoRA, rank and alpha patterns, convolutions, embeddings.
        out: where to write; missing parents are made.
        energy: the share in (0, 1] of each module's Σ σ² to keep, at the least rank that does.
        budget: how many numbers Σ rᵢ·(outᵢ + inᵢ) all modules together may have; below 1, a share of the adapter's
            own. The ranks are the best there are, as `best_ranks` finds them.
        rank: one rank for all modules, or a module's own where that is lower.
        second_moments: E[x xᵀ] of every module's inputs, (in, in), or its diagonal, (in,), as `second_moments_of` has
            them. σ are then the singular values of ΔW·E[x xᵀ]^½.
        layout: "compact": each module at its own rank, modules of rank 0 left out, but for single experts, which all
            get the largest rank among them, as PEFT wants where the base model has them in one parameter. "uniform":
            one rank for all. Unused rows and columns are zero; this padding is not counted in `budget`.
        base: the base model or where it is, if not where the adapter's config says. Where it is at hand, modules that
            the adapter knows by a name of an older transformers get their name of today.
        dtype: "float32", "bfloat16" or "float16"; by default the adapter's own, and bfloat16 for float8.
        overwrite: replace an existing `out`.

    Raises:
        ArgumentError: not exactly one of energy, budget and rank is given, `out` exists, or an argument breaks its
            rule.
        AdapterFileError: the folder holds no whole plain LoRA.
        RankwiseError: an update is not finite, or what was written does not read back as it is.

    Example:
        >>> import tempfile, peft, torch
        >>> net, folder = torch.nn.Sequential(torch.nn.Linear(6, 5)), tempfile.mkdtemp()
        >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        >>> peft.get_peft_model(net, config).save_pretrained(folder)
        >>> shrink_adapter(folder, folder + "/small", budget=0.5).ranks
        {'0': 2}
    """
    folder, out = Path(folder), Path(out)
    _check_rule(energy=energy, budget=budget, rank=rank)
    require_choice("layout", layout, ("uniform", "compact"))
    check_dtype(dtype)
    require_room("out", out, overwrite=overwrite, reads=[folder])
    plain = _read(folder, base)
    written_in = chosen_dtype(dtype, plain.dtype)
    updates = plain.updates
    moments = {} if second_moments is None else _checked(second_moments, updates)
    found = {name: _directions(f, moments.get(name)) for name, f in updates.items()}
    energies = {name: S.square() for name, (S, _) in found.items()}
    if rank is not None:
        ranks = {name: min(rank, len(values)) for name, values in energies.items()}
    elif energy is not None:
        ranks = {name: _least(values, energy) for name, values in energies.items()}
    else:
        ranks = _affordable(energies, updates, budget or 0)
    kept = {n: Factors(f.B[:, : ranks[n]], f.s[: ranks[n]], f.A[: ranks[n]]) for n, (_, f) in found.items()}
    made, factors = (uniform if layout == "uniform" else compact)(plain, kept, None)
    config = {**plain.config} | {field: made[field] for field in LAYOUT_FIELDS if field in made}
    with whole_folder(out) as beside:
        write(beside, plain, config, factors, written_in)
        read = read_any_lora(beside).updates
        check_read_back(kept, read, written_in)
        errors = {name: relative_error({name: f}, read) for name, f in updates.items()}
        error = relative_error(updates, read)
        before = {name: f.r for name, f in updates.items()}
        report = ShrinkReport(out, before, ranks, _size(updates), _size(factors), errors, error)
        how = {"energy": energy, "budget": budget, "rank": rank, "weighted": "yes" if moments else None}
        facts = {
            "Shrunk by": ", ".join(f"{name} {value}" for name, value in how.items() if value is not None),
            "Ranks before": spread(before),
            "Ranks": spread(ranks),
            "Parameters": f"{report.parameters:,} of {report.parameters_before:,}",
            "Error": f"{error:.2%} of ‖ΔW‖_F, read back from the file",
        }
        write_card(beside, out.name, plain.config.get("base_model_name_or_path"), "A LoRA shrunk by rankwise", facts)
    return report


def _read(folder: Path, base: str | Path | nn.Module | None) -> Adapter:
    """The adapter, under its base model's names of today where the base model is at hand."""
    adapter = read_any_lora(folder)
    if isinstance(adapter, PipelineLora):
        return adapter
    model = base_at_hand(base, adapter.config, folder)
    return adapter if model is None else with_names_of(model, adapter, folder)


def _directions(f: Factors, C: Tensor | None) -> tuple[Tensor, Factors]:
    """Singular values σ of ΔW·C^½, falling and above rounding, and the part of ΔW of each, balanced, in float32.

    The part of the i-th is u_i·(u_iᵀ·ΔW), with the left singular vectors u_i of ΔW·C^½.
    """
    B, s, A = (exact(t) for t in f)
    weighted = Factors(B, s, A if C is None else _root(A, C))
    U, S, _ = weighted.orthogonal()
    above_rounding = int(S.gt(weighted.rounding()).sum())
    U = U[:, :above_rounding]
    S = S[:above_rounding]
    rows = (U.mT @ (B * s)) @ A  # u_iᵀ·ΔW
    # Each part's norm is shared out evenly over its column and its row.
    half = rows.norm(dim=1).sqrt()
    columns = U * half
    rows = rows / half[:, None]
    ones = torch.ones(above_rounding, dtype=torch.float32)
    return S, Factors(columns.float(), ones, rows.float())


def _root(A: Tensor, C: Tensor) -> Tensor:
    """L with L·Lᵀ = A·C·Aᵀ."""
    if C.dim() == 1:
        return A * C.sqrt()
    values, vectors = torch.linalg.eigh(A @ C @ A.mT)
    return vectors * values.clamp(min=0).sqrt()


def _affordable(energies: Mapping[str, Tensor], updates: Mapping[str, Factors], budget: float) -> dict[str, int]:
    limit = budget if budget >= 1 else budget * _size(updates) + 1e-9  # 0.29 · 100 is 28.999… in float64
    costs = [len(updates[name].B) + updates[name].A.shape[1] for name in energies]
    return dict(zip(energies, best_ranks(list(energies.values()), costs, int(limit)), strict=True))


def _least(values: Tensor, energy: float) -> int:
    """The least number of leading values that hold this share of their sum."""
    cut = values.flip(0).cumsum(0).flip(0)  # what is lost by cutting here; summed from the small end, so exact there
    return int((cut > (1 - energy + ROUNDING) * cut[:1]).sum())


def _size(updates: Mapping[str, Factors]) -> int:
    return sum(f.B.numel() + f.A.numel() for f in updates.values())


def _check_rule(**rules: Any) -> None:
    given = {name: value for name, value in rules.items() if value is not None}
    if len(given) != 1:
        raise ArgumentError("energy`, `budget` or `rank", "be given, exactly one of them", given)
    [(name, value)] = given.items()
    if name == "rank":
        require_int("rank", value, least=1)
    require_number(name, value)
    if name == "energy" and not 0 < value <= 1:
        raise ArgumentError("energy", "be in (0, 1]", value)
    if name == "budget" and not (0 < value < 1 or (value >= 1 and value == int(value))):
        raise ArgumentError("budget", "be a whole number ≥ 1, or a share in (0, 1)", value)


def _checked(moments: Mapping[str, Tensor], updates: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The second moments of every module, in float64."""
    for name, f in updates.items():
        if name not in moments:
            raise ArgumentError("second_moments", "hold those of every module of the adapter", f"none of {name}")
        C, width = moments[name], f.A.shape[1]
        if C.shape not in ((width,), (width, width)):
            raise ArgumentError("second_moments", f"be ({width},) or ({width}, {width}) for {name}", tuple(C.shape))
        least = float((C if C.dim() == 1 else C.diagonal()).min())
        if not C.isfinite().all() or least < 0:
            raise ArgumentError("second_moments", f"be finite, with no negative square, for {name}", least)
    return {name: exact(moments[name].cpu()) for name in updates}
