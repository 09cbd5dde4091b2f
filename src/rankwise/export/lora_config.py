"""The config of a LoRA adapter as its JSON holds it: read, checked, and asked for a module's rank and scale.

It is read without PEFT, whose import takes longer than everything else that a small command does. Names, defaults and
the meaning of patterns are PEFT's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import AdapterFileError

CONFIG = "adapter_config.json"
OURS = "RANKWISE_"
"""What the peft_type of rankwise's adapters begins with."""

MODULE_NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")
"""A module's name: no path, nothing empty."""

DEFAULT_RANK = DEFAULT_ALPHA = 8
"""What PEFT takes where a config says nothing."""

MORE_THAN_UPDATES = (
    "use_dora",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Fields of PEFT's LoraConfig that make an adapter more than B·A added to the weights of modules."""

ONLY_UPDATES = (
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_type",
    "peft_version",
    "task_type",
    "inference_mode",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
)
"""Fields that leave an adapter B·A added to the weights of modules: they choose modules, give scales, or had a part in
training alone."""

OF_VARIANTS = ("eva_config", "corda_config", "loftq_config", "lora_ga_config", "megatron_config", "runtime_config")
"""Fields among them that hold settings of their own, which PEFT has rules for."""

CHOOSING_MODULES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that choose the modules."""

STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Starts of PEFT's that leave the base weight as it is; after others (PiSSA), B·A is no update of the base model."""

TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
"""What PEFT takes as a task."""


def saved_config(folder: str | Path) -> dict[str, Any]:
    """The config in a folder as it lies there, unchecked; empty where there is none."""
    try:
        return dict(json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # the reader of the adapter says what is wrong with it
        return {}


def parsed_config(text: str, file: Path) -> dict[str, Any]:
    """The config in a JSON text from `file`.

    Raises:
        AdapterFileError: it is broken, or has entries that no loader can apply.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file} is not a whole adapter config ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise AdapterFileError(f"{file} is not a whole adapter config (it holds a {type(found).__name__})")
    wrong = wrong_entry(found)
    if wrong:
        raise AdapterFileError(f"{file} {wrong}")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter.

    Raises:
        AdapterFileError: it is missing, broken, or has entries that no loader can apply.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise AdapterFileError(f"{file} is missing")
    return parsed_config(file.read_text(encoding="utf-8", errors="replace"), file)


def wrong_entry(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the entries of a config that choose modules and give ranks and scales."""
    wrong = _wrong_numbers(config) + _wrong_choices(config)
    return f"gives {wrong[0]} as {config.get(wrong[0])!r:.60}, which no loader can apply" if wrong else None


def _wrong_numbers(config: Mapping[str, Any]) -> list[str]:
    wrong = []
    if not _number(config.get("r", DEFAULT_RANK), least=1):
        wrong.append("r")
    alpha = config.get("lora_alpha", DEFAULT_ALPHA)
    # Configs of rankwise's may leave alpha out, which is then r.
    if not _number(alpha) or (alpha is None and config.get("peft_type") == "LORA"):
        wrong.append("lora_alpha")
    for key, least in (("rank_pattern", 0), ("alpha_pattern", None)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(
            _expression(k) and _number(value, least=least) for k, value in pattern.items()
        ):
            wrong.append(key)
    return wrong


def _wrong_choices(config: Mapping[str, Any]) -> list[str]:
    wrong = []
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = config.get(key)
        if not (names is None or _expression(names) or (isinstance(names, list | set | tuple) and _texts(names))):
            wrong.append(key)
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            wrong.append(key)
    if not isinstance(config.get("auto_mapping"), dict | None):
        wrong.append("auto_mapping")
    if config.get("task_type") is not None and config["task_type"] not in TASKS:
        wrong.append("task_type")
    # PEFT applies numbers of layers to a list of names only, and a pattern of layers only where numbers are given.
    for key in ("layers_to_transform", "layers_pattern"):
        if config.get(key) and isinstance(config.get("target_modules"), str):
            wrong.append(key)
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        wrong.append("layers_pattern")
    return wrong


def _texts(names: Iterable[Any]) -> bool:
    return all(isinstance(name, str) for name in names)


def _number(value: Any, *, least: int | None = None) -> bool:
    """Whether a value is a finite number or missing; where `least` is asked for, whole and at least that."""
    if least is None:
        return value is None or (isinstance(value, int | float) and math.isfinite(value))
    return isinstance(value, int) and value >= least


def _expression(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError, RecursionError):
        return False
    return isinstance(text, str)


def check_only_updates(config: Mapping[str, Any], folder: Path) -> None:
    """Raise `AdapterFileError` unless a config is a plain LoRA's: updates of modules of an unchanged base model."""
    kind = config.get("peft_type")
    if str(kind).startswith(OURS):
        method = str(kind).removeprefix(OURS).lower()
        raise AdapterFileError(f"{folder} holds a {method} adapter of rankwise: export it first")
    if kind != "LORA":
        raise AdapterFileError(f"{folder} holds no LoRA adapter: its peft_type is {kind!r}")
    if config.get("use_dora"):
        raise AdapterFileError(f"{folder} holds a DoRA adapter, whose magnitudes no plain update can hold")
    for field in MORE_THAN_UPDATES:
        if config.get(field):
            raise AdapterFileError(f"{folder} holds more than updates of modules: its config has `{field}`")
    for field, value in config.items():
        if value and field not in ONLY_UPDATES and field not in MORE_THAN_UPDATES:
            raise AdapterFileError(
                f"{folder} has `{field}` in its config, an unknown field that may mean more than updates of modules"
            )
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise AdapterFileError(f"{folder} started from {start!r}, which changes the base model: convert it first")


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """The rank that a config gives a module."""
    return _of_pattern(config.get("rank_pattern"), name, config.get("r", DEFAULT_RANK))


def scale_of(config: Mapping[str, Any], name: str) -> float | None:
    """What B·A of a module is multiplied by; None where its config gives no alpha."""
    alpha = alpha_of(config, name)
    rank = rank_of(config, name)
    if alpha is None:
        return None
    if not rank:
        return 1.0
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def alpha_of(config: Mapping[str, Any], name: str) -> float | None:
    """The alpha that a config gives a module."""
    return _of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", DEFAULT_ALPHA))


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether PEFT is sure to take a config that `wrong_entry` finds nothing wrong with: it sets nothing unusual."""
    told = {field for field, value in config.items() if value}
    # With an expression PEFT refuses numbers of layers even where they are empty.
    limits_an_expression = isinstance(config.get("target_modules"), str) and any(
        config.get(field) is not None for field in ("layers_to_transform", "layers_pattern")
    )
    is_usual = told <= set(ONLY_UPDATES) - set(OF_VARIANTS) and config.get("init_lora_weights", True) in STARTS
    return is_usual and not limits_an_expression


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether a config chooses a module, by the rules of PEFT's `check_target_module_exists`.

    A string is an expression for the whole name; a list has names or ends of names, and may be limited to layers.
    """
    if _is_named(config.get("exclude_modules"), name):
        return False
    if any(re.match(rf"(^|.*\.){kept}($|\..*)", name) for kept in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str) or name in (targets or ()):
        return _is_named(targets, name)
    return _is_named(targets, name) and _is_of_chosen_layer(config, name)


def _is_named(names: Any, name: str) -> bool:
    """Whether an expression fits a module's name, or a list has the name or an end of it."""
    if isinstance(names, str):
        return bool(names and re.fullmatch(names, name))
    return any(name == end or name.endswith(f".{end}") for end in names or ())


def _is_of_chosen_layer(config: Mapping[str, Any], name: str) -> bool:
    """Whether a module is of one of the layers that a config numbers, where it numbers any."""
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # The first number in the name counts: a later one is of an expert, say.
    expressions = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for match in (re.match(each, name) for each in expressions) if match), None)
    if found is None:
        return False
    return int(found[1]) in ([chosen] if isinstance(chosen, int) else chosen)


def _of_pattern(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that fits a module: an expression for its name, or for the end of it."""
    for expression, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", name):
            return value
    return otherwise
