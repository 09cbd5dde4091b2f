"""The base model that a SPEC names, with the head that its task needs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import prepare_model_for_kbit_training
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from rankwise.base_models import PLACES, locate, open_model, skeleton, weight_files
from rankwise.compare.spec import Training
from rankwise.compare.tasks import Splits, Task
from rankwise.compare.together import on_cpus
from rankwise.errors import ArgumentError

_MODEL_FILES = (".json", ".safetensors", ".txt", ".model")
"""Files of a model folder that hold its config, weights, vocabulary and tokenizer."""


def open_for(
    task: Task, name: str, splits: Splits, pad: int | None = None, training: Training | None = None
) -> PreTrainedModel:
    """The model that a task trains; a head that the pretrained model lacks is fresh.

    Args:
        task: what it is trained for.
        name: the pretrained model.
        splits: the data, which tells the size of the head.
        pad: the tokenizer's padding token, for models whose config names none.
        training: the SPEC's section, which may ask for quantised weights.
    """
    settings: dict[str, Any] = {} if pad is None else {"pad_token_id": pad}
    settings |= task.config_changes(splits)
    if training is None or training.quantise is None:
        return open_model(name, task.opens_as, argument="model", **settings)
    settings |= _quantising(task, training)
    model = open_model(name, task.opens_as, argument="model", **settings)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.gradient_checkpointing)
    # The Trainer refuses a quantised model without an adapter, although the floors train none of its weights.
    model._hf_peft_config_loaded = True
    return model


def _quantising(task: Task, training: Training) -> dict[str, Any]:
    """How a model is opened in four bits (NF4, as QLoRA has it) or eight; the head stays as it is."""
    computes_in = torch.bfloat16 if training.precision == "bfloat16" else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=training.quantise == "4bit",
        load_in_8bit=training.quantise == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computes_in,
        llm_int8_skip_modules=list(task.head_modules) or None,
    )
    return {"quantization_config": config, "device_map": {"": PartialState(cpu=bool(on_cpus())).device}}


def quantised_layer(inputs: int, outputs: int, quantise: str) -> nn.Linear:
    """One linear layer as it is in a quantised model, with random weights: enough to try what an adapter does to it."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt  # noqa: PLC0415  installed only where it is used

    if quantise == "4bit":
        return Linear4bit(inputs, outputs, quant_type="nf4").to("cpu")
    return Linear8bitLt(inputs, outputs, has_fp16_weights=False).to("cpu")


def skeleton_for(task: Task, name: str, splits: Splits) -> Any:
    """The same model without weights, on the meta device: enough to check what a config targets.

    Raises:
        ArgumentError: the model's config does not open, there is no model of its kind for the task, or a local folder
            holds no whole weights.
    """
    place = locate(name, argument="model")
    try:
        model = skeleton(place, task.opens_as, argument="model", **task.config_changes(splits))
    except ArgumentError as error:
        raise ArgumentError("model", f"{PLACES} that can be trained for {task.type}", name) from error
    if Path(place).is_dir():
        _check_weights(Path(place), name)
    return model


def identity(name: str) -> dict[str, str]:
    """What tells the model of a SPEC from every other: the revision of a hub model, the contents of a folder."""
    place = Path(locate(name, argument="model"))
    if not place.is_dir():
        return {"name": name, "revision": str(AutoConfig.from_pretrained(name)._commit_hash)}
    return {file.name: _fingerprint(file) for file in sorted(place.iterdir()) if file.suffix in _MODEL_FILES}


def _fingerprint(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_weights(folder: Path, name: str) -> None:
    files = weight_files(folder)
    if not files:
        raise ArgumentError("model", "be a folder with model*.safetensors in it", name)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ArgumentError("model", f"have whole weights ({file.name} is truncated)", name) from error
