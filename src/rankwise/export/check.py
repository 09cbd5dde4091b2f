"""Whether a server would load an adapter and compute what stock PEFT computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from rankwise.checks import require_choice
from rankwise.export.names_today import may_open
from rankwise.export.pipeline_files import pipeline_file, read_pipeline_files
from rankwise.export.reader import AdapterFiles, read_peft_files
from rankwise.export.servers import SERVERS, Problem

if TYPE_CHECKING:
    from rankwise.export.known_base import KnownBase


@dataclass(frozen=True)
class CheckReport:
    """What a server would make of an adapter."""

    server: str
    problems: list[Problem]
    max_lora_rank: int
    """What the server must be started with, where it has such a limit."""
    base_seen: bool
    """Whether module names and widths could be compared with the base model's."""


def check_export(folder: str | Path, server: str, *, base: str | Path | nn.Module | None = None) -> CheckReport:
    """Whether a server would load a LoRA adapter and compute what stock PEFT computes.

    Args:
        folder: any adapter, ours or not.
        server: a name in `rankwise.export.servers.SERVERS`, such as "vllm".
        base: the base model, or where it is; by default where the adapter's config says. Without one that opens,
            module names and widths are not checked, and the report says so.

    Raises:
        ArgumentError: the server is not known.
        AdapterFileError: the folder holds no adapter that can be read at all.

    Example:
        >>> import tempfile, torch, rankwise
        >>> from peft import get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5))
        >>> model = get_peft_model(net, rankwise.LoraConfig(r=2, target_modules=["0"], init_weights=False))
        >>> folder = tempfile.mkdtemp() + "/lora"
        >>> _ = rankwise.export_lora(model, folder)
        >>> rankwise.check_export(folder, "vllm", base=net).problems
        []
    """
    require_choice("server", server, tuple(SERVERS))
    files = read_files(Path(folder))
    files.base = _known(base, files)
    asked = SERVERS[server]
    limit = asked.rank_limit(files.largest_rank)
    return CheckReport(server, asked.problems(files), limit, files.base is not None)


def _known(base: str | Path | nn.Module | None, files: AdapterFiles) -> KnownBase | None:
    """What is known of the base model; PEFT and transformers, slow to import, are left alone where there is none."""
    if files.is_of_pipeline:
        if base is None:
            return None
        from rankwise.export.known_pipeline import known_pipeline

        return known_pipeline(base)
    if base is None and not may_open(files.config):
        return None
    from rankwise.export.known_base import known_base

    return known_base(base, files.config, files.folder, files.tensors)


def read_files(folder: Path) -> AdapterFiles:
    """An adapter as it lies there: PEFT's folder, or the file of a pipeline's LoRA.

    Raises:
        AdapterFileError: there is none, or a file is broken.
    """
    file = pipeline_file(folder)
    return read_peft_files(folder) if file is None else read_pipeline_files(file)
