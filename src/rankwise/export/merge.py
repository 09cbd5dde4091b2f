"""Adapters of one base model merged into one: the weighted sum of their updates, exact in factored form.

Σ w_i ΔW_i = [B_1 … B_n]·diag(w_1 s_1, …, w_n s_n)·[A_1; …; A_n] is itself an update. Two QR decompositions and one SVD
of a small matrix bring it to its own rank, so that only a private merge, whose noise has full rank, is ever dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rankwise.checks import require_choice, require_int, require_number, require_room
from rankwise.errors import ArgumentError
from rankwise.export.card import spread, write_card
from rankwise.export.combine import combined, given_weights, read_adapters
from rankwise.export.dtypes import check_dtype, chosen_dtype
from rankwise.export.layouts import balanced, check_read_back, compact, leading, relative_error, uniform, write
from rankwise.export.pipeline_lora import merged_like, read_any_lora
from rankwise.files import whole_folder
from rankwise.update import Factors

if TYPE_CHECKING:
    from rankwise.export.privacy import Guarantee


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote."""

    folder: Path
    layout: str
    rank: int
    """The config's r: what a server must allow."""
    ranks: dict[str, int]
    """The rank each module holds, by name in the base model; modules added with zero factors hold 0."""
    weights: tuple[float, ...]
    relative_error: float
    """‖ΔW_written − ΔW‖_F / ‖ΔW‖_F over all modules, read back from the file; ΔW is the noisy sum if private."""
    guarantee: Guarantee | None
    """Of a private merge."""


def merge_adapters(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    privacy: tuple[float, float] | None = None,
    clip: float | None = None,
    base: str | Path | nn.Module | None = None,
    seed: int | None = None,
    layout: str = "uniform",
    dtype: str | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Write the weighted sum of adapters as one plain LoRA, exactly, at a smaller rank, or privately.

    ΔW = Σ w_i ΔW_i per module; a module that an adapter lacks counts as 0. Modules trained in full are averaged with
    the same weights. Privately, ΔW + N with N dense and i.i.d. N(0, σ²), then truncated; see `rankwise.export.privacy`.

    Args:
        folders: adapters, plain LoRA or saved by rankwise, in any mix; ΔW_i of a module is (out, in) in each.
        out: where to write; missing parents are made.
        weights: one per adapter, by default 1/n each. For a private merge they must not depend on the adapters' data.
        rank: the most ranks of a module; each sum is truncated optimally and the report states the error.
        privacy: (ε, δ): one adapter replaced by any other changes the distribution of the result by no more. Needs
            `rank`, and NB-LoRA adapters of one config, whose bounds hold by construction, or `clip`.
        clip: C; each adapter's whole update is scaled down to √Σ_l ‖ΔW_l‖_F² ≤ C before a private merge.
        base: the base model or where it is, where rankwise adapters or a private merge need another than their
            config's. Bounds relative to its weights need those weights. Where it is at hand, modules that plain
            adapters know by a name of an older transformers get their name of today.
        seed: of the noise, for tests only: whoever knows it can subtract the noise, so that nothing is guaranteed.
        layout: "uniform" or "compact", as in `export_lora`.
        dtype: "float32", "bfloat16" or "float16"; by default the narrowest that holds every adapter's own. A private
            merge is in float32 by default, since the adapters' own may tell of one of them.
        overwrite: replace an existing folder.

    Raises:
        ArgumentError: an argument breaks its rule, or `out` exists.
        AdapterFileError: a folder holds no whole adapter, or the adapters disagree on a module.
        RankwiseError: the adapters hold what cannot be merged, or have no bound that a private merge may trust.

    Example:
        >>> import tempfile, torch, rankwise
        >>> from peft import get_peft_model
        >>> from rankwise.export.merge import merge_adapters
        >>> folders = [tempfile.mkdtemp() + "/lora" for _ in range(2)]
        >>> for folder in folders:
        ...     config = rankwise.LoraConfig(r=2, target_modules=["0"], init_weights=False)
        ...     _ = rankwise.export_lora(get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config), folder)
        >>> merge_adapters(folders, tempfile.mkdtemp() + "/merged").ranks
        {'0': 4}
    """
    out = Path(out)
    require_choice("layout", layout, ("uniform", "compact"))
    check_dtype(dtype)
    if rank is not None:
        require_int("rank", rank, least=1)
    _check_privacy(privacy, clip, rank, seed)
    require_room("out", out, overwrite=overwrite, reads=[*folders, *([base] if isinstance(base, str | Path) else [])])
    given = given_weights(weights, len(folders))
    adapters = read_adapters(folders, base)
    if privacy is None:
        merged, guarantee, truncation = merged_like(adapters, combined(adapters, given), folders), None, 0.0
        merged = dataclasses.replace(merged, updates={name: _recombined(f) for name, f in merged.updates.items()})
        written = {name: balanced(f if rank is None else leading(f, rank)) for name, f in merged.updates.items()}
    else:
        # A private merge needs the base model, and with it PEFT, which takes longer to import than others take in all.
        from rankwise.export.base import opened_base
        from rankwise.export.privacy import private_merge

        model = opened_base(base, adapters[0].config, Path(folders[0]))
        merged, guarantee, truncation = private_merge(adapters, given, model, privacy, clip, rank or 1, seed)
        written = merged.updates
    written_in = chosen_dtype(dtype, merged.dtype)
    config, factors = (uniform if layout == "uniform" else compact)(merged, written, rank)
    with whole_folder(out) as beside:
        write(beside, merged, config, factors, written_in)
        read = read_any_lora(beside).updates
        check_read_back(written, read, written_in)
        error = relative_error(merged.updates, read)
        ranks = {name: written[name].r if name in written else 0 for name in factors}
        report = MergeReport(out, layout, config["r"], ranks, given, max(error, truncation), guarantee)
        _card(beside, config, report, folders)
    return report


def _card(beside: Path, config: Mapping[str, Any], report: MergeReport, folders: Sequence[str | Path]) -> None:
    """Of a private merge in public figures only: ranks and errors are of the noisy sum, and so are public."""
    names = [Path(folder).name for folder in folders] if report.guarantee is None else [f"{len(folders)} adapters"]
    facts = {
        "Merged from": ", ".join(f"`{name}`" for name in names),
        "Weights": ", ".join(f"{w:g}" for w in report.weights),
        "Ranks": spread(report.ranks),
        "Error": f"{report.relative_error:.1e} of the sum's norm",
    }
    more = "" if report.guarantee is None else report.guarantee.text()
    write_card(
        beside, report.folder.name, config.get("base_model_name_or_path"), "LoRAs merged by rankwise", facts, more=more
    )


def _check_privacy(privacy: tuple[float, float] | None, clip: float | None, rank: int | None, seed: int | None) -> None:
    if privacy is None:
        for name, value in {"clip": clip, "seed": seed}.items():
            if value is not None:
                raise ArgumentError(name, "come with `privacy`", value)
        return
    if rank is None:
        raise ArgumentError("rank", "be given with `privacy`, since noise has full rank", rank)
    if clip is not None:
        require_number("clip", clip, least=1e-30)


def _recombined(f: Factors) -> Factors:
    """The same update by its singular directions, without those that are rounding."""
    U, s, Vh = f.orthogonal()
    kept = int((s > f.rounding()).sum())
    return Factors(U[:, :kept], s[:kept], Vh[:kept])
