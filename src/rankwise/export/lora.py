"""Export to a plain LoRA: closed form for every method, whole or not at all, verified before success is reported."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.adapters.lookup import reduced
from rankwise.adapters.progress import unfinished
from rankwise.checks import require_choice, require_int, require_room
from rankwise.errors import ArgumentError, RankwiseError
from rankwise.export.adapter import TrainedAdapter, check_adapter
from rankwise.export.base import told_base
from rankwise.export.card import spread, write_card
from rankwise.export.check import read_files
from rankwise.export.known_base import KnownBase, class_in_config
from rankwise.export.layouts import TOLERANCE, compact, leading, relative_error, uniform, write
from rankwise.export.logits import logits_error
from rankwise.export.reader import read_lora, recorded_command
from rankwise.export.servers import SERVERS, Server
from rankwise.export.trained import from_folder, from_model
from rankwise.files import whole_folder
from rankwise.methods import METHODS
from rankwise.update import Factors

LOGITS = 1e-4
"""Largest relative difference of logits, in float32, of an export without truncation."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    folder: Path
    layout: str
    rank: int
    """The config's r: what a server must allow."""
    ranks: dict[str, int]
    """The rank each module holds, by name in the base model; modules added with zero factors hold 0."""
    parameters: int
    """Numbers in the adapter's tensors as written, padding included."""
    relative_error: float
    """‖ΔW_exported − ΔW‖_F / ‖ΔW‖_F over all modules, read back from the file."""
    max_lora_rank: int | None = None
    """What the server it was written for must be started with."""
    logits_error: float | None = None
    """The largest difference of a logit from the adapter's, relative to the largest logit, where it was asked for."""


def export_lora(
    model_or_folder: nn.Module | str | Path,
    folder: str | Path,
    *,
    adapter: str = "default",
    layout: str = "uniform",
    rank: int | None = None,
    base: str | Path | nn.Module | None = None,
    server: str | None = None,
    logits_of: str | Path | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a trained adapter as a plain LoRA that stock PEFT and servers load without rankwise.

    ΔW = B·diag(s)·A becomes lora_B = B·diag(s), lora_A = A with lora_alpha = r, so that the scale is 1 everywhere.

    Args:
        model_or_folder: the adapted model, or a folder written by its `save_pretrained`.
        folder: where to write; missing parents are made.
        adapter: which adapter of a live model.
        layout: "uniform": one rank for all modules, unused rows and columns zero, every module present in every layer.
            "compact": each module at its own rank through rank_pattern, modules of rank 0 left out.
        rank: the rank to write, by default the largest a module holds. Below it, each update is truncated optimally
            and the report states the error.
        base: for a folder, the base model or where it is, if not where the adapter's config says.
        server: a name in `rankwise.export.servers.SERVERS`, such as "vllm": write what it takes, under its names, with
            zero factors where it needs them, and check the result by `check_export`'s rules.
        command: what trained it, for the model card.
        logits_of: for a folder, where the base model's weights are: compare the whole model's logits too.
        overwrite: replace an existing folder.

    Raises:
        ArgumentError: the folder exists, or an argument breaks its rule.
        AdapterFileError: the source folder holds no whole rankwise adapter.
        RankwiseError: the adapter cannot be a plain LoRA, the server cannot take it, or what was written does not read
            back as it is.

    Example:
        >>> import tempfile, torch, rankwise
        >>> from peft import get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5))
        >>> model = get_peft_model(net, rankwise.SoraConfig(r=2, target_modules=["0"], init_weights=False))
        >>> rankwise.export_lora(model, tempfile.mkdtemp() + "/lora").ranks
        {'0': 2}
    """
    folder = Path(folder)
    require_choice("layout", layout, ("uniform", "compact"))
    if rank is not None:
        require_int("rank", rank, least=1)
    if server is not None:
        require_choice("server", server, tuple(SERVERS))
    written_for = None if server is None else SERVERS[server]
    live = isinstance(model_or_folder, nn.Module)
    read = [at for at in (model_or_folder, base, logits_of) if isinstance(at, str | Path)]
    require_room("folder", folder, overwrite=overwrite, reads=read)
    source = from_model(model_or_folder, adapter) if live else from_folder(Path(model_or_folder), base)
    check_adapter(source, "the adapter")
    left = None if live else unfinished(source.method, source.progress, source.ranks)  # a live model's state has warned
    if left:
        warnings.warn(left, stacklevel=2)
    written = _truncated(source, rank)
    config, factors = _laid_out(source, written, layout, rank, written_for)
    if isinstance(base, str | Path):
        config |= {"base_model_name_or_path": str(base), "revision": told_base(base, source.config, folder)[1]}
    with whole_folder(folder) as beside:
        write(beside, source, config, factors)
        error = relative_error(source.updates, read_lora(beside).updates)
        if error > TOLERANCE:  # only a truncation that was asked for may be the reason
            allowed = TOLERANCE + relative_error(source.updates, written)
            if error > allowed:
                raise RankwiseError(f"the export would differ from the adapter by {error:.1e}, more than {allowed:.1e}")
        logits = None if logits_of is None else _checked_logits(logits_of, model_or_folder, beside, written, source)
        if written_for is not None:
            _write_for(written_for, beside, source)
        ranks = {name: written[name].r if name in written else 0 for name in factors}
        limit = None if written_for is None else written_for.rank_limit(config["r"])
        parameters = sum(f.B.numel() + f.A.numel() for f in factors.values())
        report = ExportReport(folder, layout, config["r"], ranks, parameters, error, limit, logits)
        trained_with = command or (None if live else recorded_command(model_or_folder))
        _card(beside, folder, source, config, report, written_for, trained_with)
    return report


def _laid_out(
    source: TrainedAdapter, written: dict[str, Factors], layout: str, rank: int | None, server: Server | None
) -> tuple[dict[str, Any], dict[str, Factors]]:
    if layout == "compact":
        return compact(source, written, rank)
    own_names = {name.rpartition(".")[2] for name in written}
    wanted_beside = [] if server is None else server.modules_wanted_beside(own_names)
    return uniform(source, written, rank, wanted_beside)


def _checked_logits(
    model: str | Path,
    adapter: nn.Module | str | Path,
    folder: Path,
    written: dict[str, Factors],
    source: TrainedAdapter,
) -> float:
    if isinstance(adapter, nn.Module):
        raise ArgumentError("logits_of", "come with a saved adapter", model)
    error = logits_error(model, Path(adapter), folder)
    if error > LOGITS and relative_error(source.updates, written) <= TOLERANCE:
        raise RankwiseError(
            f"the export's logits would differ from the adapter's by {error:.1e}, more than {LOGITS:.0e}"
        )
    return error


def _card(
    beside: Path,
    folder: Path,
    source: TrainedAdapter,
    config: dict[str, Any],
    report: ExportReport,
    server: Server | None,
    command: str | None,
) -> None:
    method = METHODS[source.method.method]
    settings = {f.name: getattr(source.method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]  all are
    facts = {
        "Method": f"{source.method.method}: {method.summary}",
        "Settings": ", ".join(f"{k}={v!r}" for k, v in settings.items() if isinstance(v, str | int | float)),
        "Trained with": None if command is None else f"`{command}`",
        "Optimiser steps": str(source.progress.step) if source.progress.step else None,
        "Ranks": spread(report.ranks),
        "Parameters": f"{report.parameters:,} in the {report.layout} layout",
        "Rank to allow when serving": str(report.max_lora_rank or report.rank),
        "Error of the export": f"{report.relative_error:.1e} of ‖ΔW‖_F, read back from the file",
        "Made for": None if server is None else server.name,
    }
    loader = server or SERVERS["peft"]
    write_card(
        beside,
        folder.name,
        config["base_model_name_or_path"],
        "A LoRA trained by rankwise",
        facts,
        load=loader.load_code,
        library=loader.hub_tag,
    )


def _write_for(server: Server, folder: Path, source: TrainedAdapter) -> None:
    """Give a written adapter the server's names, and make sure that the server takes it."""
    server.rewrite(folder, source.base_class)
    files = read_files(folder)
    shapes = {name: form.shape for name, form in source.formats.items()}
    if server.loads_peft_folders:
        files.base = KnownBase(frozenset(source.names), shapes, *class_in_config(None, files.config, folder))
    problems = server.problems(files)
    if problems:
        raise RankwiseError(f"{server.name} would not serve this adapter as it is: {problems[0].sentence}")


def _truncated(source: TrainedAdapter, rank: int | None) -> dict[str, Factors]:
    """Each update without the ranks that hold nothing, and at most `rank` of its singular directions."""
    kept = reduced(source.updates, source.method)
    if rank is None:
        return kept
    return {name: f if f.r <= rank else leading(f, rank) for name, f in kept.items()}
