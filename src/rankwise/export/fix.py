"""An adapter's folder as PEFT and servers want it, from one whose names, file or dtype they do not take.

Training loops leave such folders behind: a wrapper's name in every key (torch.compile, FSDP, DDP), the adapter's own
name, no prefix, a pickle, float8; and years leave names that the base model's modules have no more. No number changes,
unless another dtype is asked for.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.adapters.tuner import PREFIX
from rankwise.checks import require_room
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.export.adapter import key_not_finite
from rankwise.export.card import CARD, write_card
from rankwise.export.dtypes import DTYPES, check_dtype
from rankwise.export.fixed_names import Renamed, changes_of_names, renamed_tensors, with_names_of
from rankwise.export.into_base.checkpoint import pickled_tensors
from rankwise.export.keys import parsed_key
from rankwise.export.known_base import KnownBase, known_base
from rankwise.export.logits import logits_error
from rankwise.export.lora import LOGITS
from rankwise.export.lora_config import CONFIG, MORE_THAN_UPDATES, OURS, read_config
from rankwise.export.names_today import base_at_hand
from rankwise.export.pipeline_files import pipeline_file
from rankwise.export.reader import (
    COPIES,
    FOREIGN,
    TENSORS,
    AdapterFiles,
    needless_copies,
    read_tensors,
    widened,
)
from rankwise.export.servers import SERVERS
from rankwise.export.servers.peft import VOCABULARY
from rankwise.export.servers.rules import foreign_keys, is_saved_embedding
from rankwise.files import whole_folder

PICKLE = "adapter_model.bin"
COPIED = (".json", ".jinja", ".md", ".model", ".txt")
"""Endings of the files that are copied beside the adapter: tokenizer, card, notes; never a pickle."""
WRAPPER_CLASSES = ("OptimizedModule", "FullyShardedDataParallel", "DistributedDataParallel", "DataParallel")
"""What PEFT notes as the base model's class where a wrapper stood around it."""


@dataclass(frozen=True)
class FixReport:
    """What a repair changed."""

    folder: Path
    changes: tuple[str, ...]
    """What was changed, a sentence each; empty where there was nothing to mend."""
    logits_error: float | None = None
    """max |logits of the output − logits of the input| / max |logits of the input|, both loaded by PEFT."""
    not_compared: str | None = None
    """Why logits were not compared although a base model was given."""


@torch.no_grad()
def fix_adapter(
    folder: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> FixReport:
    """Write an adapter again as PEFT and servers take it, every number as it is: ΔW' = ΔW.

    Wrappers' names and the adapter's own are taken out of the tensors' names, PEFT's prefix is put before them, modules
    get the names that they have in today's transformers, and a pickle becomes safetensors. What was written is read
    back and compared with the input, tensor by tensor.

    Args:
        folder: a LoRA adapter of PEFT's, of any kind, or one of rankwise's.
        out: where to write; missing parents are made. Tokenizer, card and notes are copied.
        base: the base model: a folder, hub id or embedded model. PEFT must then load all that is written onto it, and
            where PEFT can load the input, the logits of both are compared. Where none is given, the base model that
            the config names tells today's names of modules, if it lies on this machine.
        dtype: "float32", "bfloat16" or "float16" for all tensors of real numbers; by default each keeps its own.
        overwrite: replace an existing `out`.

    Raises:
        ArgumentError: `out` exists, `base` does not open, or an argument breaks its rule.
        AdapterFileError: the folder holds no adapter, one of another kind, two names of one tensor or module, a tensor
            that is no part of such an adapter, or something else that cannot be mended.
        RankwiseError: a pickle holds more than tensors; what was written does not read back as it is, or computes
            something else.

    Example:
        >>> import tempfile, peft, torch
        >>> net, folder = torch.compile(torch.nn.Sequential(torch.nn.Linear(6, 5))), tempfile.mkdtemp()
        >>> config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> peft.get_peft_model(net, config).save_pretrained(folder)
        >>> for change in fix_adapter(folder, folder + "/mended").changes:
        ...     print(change)
        took the wrapper's name '_orig_mod' out of 2 keys, as 'base_model.model._orig_mod.0.lora_A.weight'
        took the base model's class out of adapter_config.json, which was the wrapper's, 'OptimizedModule'
    """
    folder, out = Path(folder), Path(out)
    check_dtype(dtype)
    require_room("out", out, overwrite=overwrite, reads=[folder])
    config = _checked_config(folder, dtype)
    file, tensors = _read(folder)
    known = None if base is None else known_base(base, config, folder, tensors)

    renamed = renamed_tensors(tensors, file)
    mended_config, config_changes = _mended_config(config, renamed)
    model = base_at_hand(None, config, folder) if known is None else known.models[0]
    if model is not None:
        mended_config, renamed, today_changes = with_names_of(model, mended_config, renamed, folder)
        config_changes += today_changes
        # Whoever gives tensors other modules must know that these take them.
        known = known_base(None, config, folder, tensors) if known is None and today_changes else known

    left_out = _left_out(renamed, tensors, mended_config, file)
    kept = {each.new: tensors[each.old] for each in renamed if each.old not in left_out}
    _check_tensors(AdapterFiles(folder, mended_config, kept), file)
    written = kept if dtype is None else {key: _in_dtype(t, DTYPES[dtype]) for key, t in kept.items()}

    changes = [f"read {PICKLE}, a pickle, and wrote {TENSORS}"] if file.name == PICKLE else []
    changes += changes_of_names(renamed)
    changes += left_out.values()
    changes += _changes_of_dtype(kept, written)
    changes += config_changes

    with whole_folder(out) as beside:
        _copy_files_beside(folder, beside)
        if mended_config != config:
            (beside / CONFIG).write_text(json.dumps(mended_config, indent=2), encoding="utf-8")
        _write_tensors(beside / TENSORS, written)
        if not (beside / CARD).exists():
            facts = {"Mended": "; ".join(changes) or "nothing"}
            write_card(beside, out.name, config.get("base_model_name_or_path"), "An adapter mended by rankwise", facts)

        _check_written(beside, written)
        _check_loads(beside, mended_config, known)
        not_compared = None if base is None or known is None else _why_not_compared(known, folder)
        error = None if base is None or not_compared else logits_error(base, folder, beside)
        # Only numbers that another dtype has rounded may give other logits.
        if error is not None and error > LOGITS and not _is_rounded(kept, written):
            raise RankwiseError(f"the logits would differ from those of {folder} by {error:.1e} of their largest")
    return FixReport(out, tuple(changes), error, not_compared)


# --- what lies in the folder ----------------------------------------------------------------------------------------


def _checked_config(folder: Path, dtype: str | None) -> dict[str, Any]:
    """The adapter's config, if it is of a kind that can be mended."""
    if pipeline_file(folder) is not None:
        raise AdapterFileError(f"{folder} holds the LoRA of a pipeline, and only PEFT's folders are mended")
    config = read_config(folder)
    kind = str(config.get("peft_type"))
    is_ours = kind.startswith(OURS)
    if kind != "LORA" and not is_ours:
        raise AdapterFileError(
            f"{folder} holds an adapter of neither PEFT's LoRA nor rankwise: its peft_type is {kind!r}"
        )
    if is_ours and dtype is not None:
        raise ArgumentError("dtype", "be left out for an adapter of rankwise's, whose tensors have their dtypes", dtype)
    return config


def _read(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file that PEFT would read, and its tensors."""
    if not (folder / TENSORS).is_file() and (folder / PICKLE).is_file():
        return folder / PICKLE, pickled_tensors(folder / PICKLE)
    return folder / TENSORS, read_tensors(folder / TENSORS)


# --- tensors --------------------------------------------------------------------------------------------------------


def _left_out(
    renamed: Iterable[Renamed], tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path
) -> dict[str, str]:
    """A sentence about each tensor that says nothing of its own, by the tensor's old name."""
    files = AdapterFiles(file.parent, dict(config), {each.new: tensors[each.old] for each in renamed})
    copies = needless_copies(files.tensors, file)
    found: dict[str, str] = {}
    for each in renamed:
        told = parsed_key(each.new)
        if told.part == "alpha" and files.alphas.get(told.module) == files.alpha(told.module):
            found[each.old] = f"left out {each.old!r}, which repeats the lora_alpha of {CONFIG}"
        elif COPIES[0] in each.new:
            found[each.old] = f"left out {each.old!r}, the weight before training of a module trained in full"
        elif each.new in copies:
            found[each.old] = f"left out {each.old!r}, a second copy of a module trained in full"
    return found


def _check_tensors(files: AdapterFiles, file: Path) -> None:
    """Raise `AdapterFileError` for a tensor that the config's kind of adapter does not have, or that is not finite."""
    config = files.config
    has_more = any(config.get(entry) for entry in MORE_THAN_UPDATES)
    trains_biases = config.get("bias") not in (None, "none")
    if files.alphas:
        name, alpha = next(iter(files.alphas.items()))
        by_config = files.alpha(name)
        raise AdapterFileError(
            f"{file} holds {name + '.alpha'!r}, {alpha:g}, and {CONFIG} says {by_config}: which is it?"
        )
    for name in foreign_keys(files):
        is_of_more = has_more and (FOREIGN.search(name) or "trainable_tokens" in name)
        is_bias = trains_biases and name.endswith(".bias")
        is_ours = f".{PREFIX}" in name
        if not (is_of_more or is_bias or is_ours or is_saved_embedding(name)):
            raise AdapterFileError(f"{file} holds {name!r}, which is no part of the adapter that {CONFIG} describes")
    broken = key_not_finite(files.tensors)
    if broken:
        raise AdapterFileError(f"{file} holds NaN or infinity in {broken!r}")


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _changes_of_dtype(kept: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> list[str]:
    """What is changed in dtypes, a sentence for each pair of them."""
    pairs = Counter((str(kept[key].dtype), str(t.dtype)) for key, t in written.items() if t.dtype != kept[key].dtype)
    return [
        f"turned {count} tensors of {old.removeprefix('torch.')} into {new.removeprefix('torch.')}"
        for (old, new), count in pairs.items()
    ]


def _is_rounded(kept: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> bool:
    """Whether another dtype has changed a number."""
    return any(not torch.equal(kept[key].double(), tensor.double()) for key, tensor in written.items())


# --- the config -----------------------------------------------------------------------------------------------------


def _mended_config(config: dict[str, Any], renamed: Iterable[Renamed]) -> tuple[dict[str, Any], list[str]]:
    """The config without the wrappers that the tensors' names had, and a sentence for each change."""
    wrappers = {wrapper for each in renamed for wrapper in parsed_key(each.old).wrappers}
    mended, changes = dict(config), []

    def unwrapped(name: Any) -> Any:
        told = parsed_key(name) if isinstance(name, str) else None
        return told.module if told and told.module and wrappers.issuperset(told.wrappers) else name

    for entry in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        given = config.get(entry)
        if isinstance(given, list):
            mended[entry] = [unwrapped(name) for name in given]
        elif isinstance(given, dict):
            mended[entry] = {unwrapped(name): value for name, value in given.items()}
        if mended.get(entry) != given:
            changes.append(f"took wrappers' names out of {entry} in {CONFIG}")
    # PEFT notes the class of what it was given, here of a wrapper, which no loader can make.
    noted = (config.get("auto_mapping") or {}).get("base_model_class")
    if noted in WRAPPER_CLASSES:
        mended["auto_mapping"] = None
        changes.append(f"took the base model's class out of {CONFIG}, which was the wrapper's, {noted!r}")
    return mended, changes


# --- writing and checking -------------------------------------------------------------------------------------------


def _copy_files_beside(folder: Path, beside: Path) -> None:
    """Copy the config, and what lies beside the adapter and is no pickle."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in COPIED:
            shutil.copyfile(path, beside / path.name)


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the adapter's tensors."""
    # Those of a pickle may share memory, which safetensors refuses.
    alone = {}
    for key, tensor in tensors.items():
        alone[key] = tensor.clone(memory_format=torch.contiguous_format)
    save_file(alone, file, {"format": "pt"})


def _check_written(beside: Path, wanted: Mapping[str, Tensor]) -> None:
    """Raise `RankwiseError` unless the file holds exactly these tensors, each finite."""
    found = read_tensors(beside / TENSORS)
    if found.keys() != wanted.keys():
        raise RankwiseError(f"what was written holds other tensors: {sorted(found.keys() ^ wanted.keys())[0]!r}")
    for key, tensor in wanted.items():
        if found[key].dtype != tensor.dtype or not torch.equal(widened(found[key]), widened(tensor)):
            raise RankwiseError(f"what was written differs in {key!r}")
    broken = key_not_finite(found)
    if broken:
        raise RankwiseError(f"{broken!r} would hold NaN or infinity in {found[broken].dtype}")


def _check_loads(beside: Path, config: dict[str, Any], known: KnownBase | None) -> None:
    """Raise `AdapterFileError` where PEFT would refuse what was written, or leave some of it out."""
    if config["peft_type"] == "LORA":
        files = AdapterFiles(beside, config, read_tensors(beside / TENSORS), base=known)
        problems = SERVERS["peft"].problems(files)
        # Whoever loads the adapter resizes the vocabulary, before and after.
        sentences = [problem.sentence for problem in problems if problem.rule != VOCABULARY]
    else:
        sentences = [] if known is None else known.left_out_by_peft(beside) or []
    if sentences:
        how = "; this was told without the base model, pass `base`" if known is None else ""
        raise AdapterFileError(f"what is wrong with this adapter cannot be mended here: {sentences[0]}{how}")


def _why_not_compared(known: KnownBase, folder: Path) -> str | None:
    """Why logits of the input and the output cannot be compared; None if they can."""
    config = getattr(known.models[0], "config", None) if known.models else None
    if not hasattr(config, "vocab_size") or getattr(config, "is_encoder_decoder", False):
        return "the base model is none that reads a text and nothing else"
    left_out = known.left_out_by_peft(folder)
    return f"PEFT does not read the input as it is ({left_out[0]})" if left_out else None
