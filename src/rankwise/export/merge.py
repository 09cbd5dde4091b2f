"""Adapters of one base model merged into one: the weighted sum of their updates, exact in factored form.

Σ w_i ΔW_i = [B_1 … B_n]·diag(w_1 s_1, …, w_n s_n)·[A_1; …; A_n] is itself an update. Two QR decompositions and one SVD
of a small matrix bring it to its own rank, so that only a private merge, whose noise has full rank, is ever dense.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
from peft import PeftConfig
from torch import nn

from rankwise.checks import require_choice, require_int, require_number, require_room
from rankwise.errors import ArgumentError, RankwiseError
from rankwise.export.card import spread, write_card
from rankwise.export.combine import FROZEN, Merged, combined, given_weights, read_adapters
from rankwise.export.layouts import Adapter, compact, leading, relative_error, uniform, write
from rankwise.export.lora import TOLERANCE
from rankwise.export.plain import read_plain
from rankwise.export.privacy import Guarantee, private_sum
from rankwise.export.source import forms_of, opened_base, saved_config
from rankwise.files import whole_folder
from rankwise.update import Factors


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
            config's. Bounds relative to its weights need those weights.
        seed: of the noise, for tests only: whoever knows it can subtract the noise, so that nothing is guaranteed.
        layout: "uniform" or "compact", as in `export_lora`.
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
    if rank is not None:
        require_int("rank", rank, least=1)
    _check_privacy(privacy, clip, rank, seed)
    require_room("out", out, overwrite=overwrite, reads=[*folders, *([base] if isinstance(base, str | Path) else [])])
    given = given_weights(weights, len(folders))
    adapters = read_adapters(folders, base)
    if privacy is None:
        merged, guarantee, truncation = combined(adapters, given), None, 0.0
        merged = dataclasses.replace(merged, updates={name: _recombined(f) for name, f in merged.updates.items()})
        written = {name: f if rank is None else leading(f, rank) for name, f in merged.updates.items()}
    else:
        model = opened_base(base, saved_config(folders[0]), Path(folders[0]))
        merged, guarantee, truncation = _private(adapters, given, model, privacy, clip, rank or 1, seed)
        written = merged.updates
    config, factors = (uniform if layout == "uniform" else compact)(merged, written, rank)
    with whole_folder(out) as beside:
        write(beside, merged, config, factors)
        error = relative_error(merged.updates, read_plain(beside).updates)
        allowed = TOLERANCE + relative_error(merged.updates, written)
        if error > allowed:
            raise RankwiseError(f"what was written would differ from the merge by {error:.1e}, above {allowed:.1e}")
        ranks = {name: written[name].r if name in written else 0 for name in factors}
        report = MergeReport(out, layout, config.r, ranks, given, max(error, truncation), guarantee)
        _card(beside, config, report, folders)
    return report


def _card(beside: Path, config: peft.LoraConfig, report: MergeReport, folders: Sequence[str | Path]) -> None:
    """Of a private merge in public figures only: ranks and errors are of the noisy sum, and so are public."""
    names = [Path(folder).name for folder in folders] if report.guarantee is None else [f"{len(folders)} adapters"]
    facts = {
        "Merged from": ", ".join(f"`{name}`" for name in names),
        "Weights": ", ".join(f"{w:g}" for w in report.weights),
        "Ranks": spread(report.ranks),
        "Error": f"{report.relative_error:.1e} of the sum's norm",
    }
    more = "" if report.guarantee is None else guarantee_text(report.guarantee)
    write_card(beside, report.folder.name, config.base_model_name_or_path, "LoRAs merged by rankwise", facts, more=more)


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


def _private(
    adapters: Sequence[Adapter],
    weights: tuple[float, ...],
    model: nn.Module,
    privacy: tuple[float, float],
    clip: float | None,
    rank: int,
    seed: int | None,
) -> tuple[Merged, Guarantee, float]:
    """What may be published, its guarantee, and the error of its truncation."""
    for adapter in adapters:
        head = next((key for key in adapter.others if FROZEN not in key), None)
        if head:
            raise RankwiseError(f"a private merge holds updates of bounded norm, and {head!r} is trained in full")
    forms, names = forms_of(model)
    found, guarantee, truncation = private_sum(adapters, weights, model, forms, privacy, clip, rank, seed)
    if guarantee.noise_to_signal > 1:
        warnings.warn(
            f"this merge is useless: its noise is {guarantee.noise_to_signal:.3g} times what it merges", stacklevel=3
        )
    # a config with nothing of an adapter's but what all share
    own = adapters[0].config
    config = PeftConfig(task_type=own.task_type, base_model_name_or_path=own.base_model_name_or_path)
    return Merged(config, found, {}, forms, names), guarantee, truncation


def guarantee_text(promise: Guarantee) -> str:
    """The guarantee and its assumptions, in public figures only, for the README.md beside a private merge."""
    n, noise = len(promise.weights), math.hypot(*promise.noise.values())
    largest = promise.bound * sum(abs(w) for w in promise.weights)
    if promise.seeded:
        holds = "**No guarantee**: the noise came from a given seed, and whoever knows it can subtract the noise."
    else:
        holds = (
            f"This merge is ({promise.epsilon:g}, {promise.delta:g})-differentially private: replacing any one of the "
            f"{n} adapters by any other changes the probability of any set of results by no more than a factor "
            f"e^{promise.epsilon:g} and {promise.delta:g}."
        )
    useless = "\nThe noise exceeds whatever the merge can hold: it is of no use.\n" if noise > largest else ""
    return f"""## A private merge of {n} adapters

{holds}

- Mechanism: analytic Gaussian (Balle and Wang, 2018), dense noise on every entry of every adapted module, then
  truncation; adjacency: one adapter replaced.
- Weights: {", ".join(f"{w:g}" for w in promise.weights)}.
- Norm of one adapter's whole update: at most {promise.bound:.6g}, by {promise.origin}.
- Sensitivity 2·max|w|·{promise.bound:.6g} = {promise.sensitivity:.6g}; σ = {promise.sigma:.6g} per entry.
- Norm of the noise before truncation: about {noise:.4g} over {len(promise.noise)} modules; of the merge without it: at
  most {largest:.4g}.
{useless}
Assumed: the weights, rank, base model, modules, bound and (ε, δ) were chosen without a look at the adapters' data.
An adapter stands for all data it was trained on. Not covered: several releases from the same adapters, whose ε and δ
add up; what one of them says elsewhere; attacks on floating-point sampling of noise.
"""
