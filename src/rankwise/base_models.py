"""Opening a base model: its folder, its modules without weights, the whole model, or its tokenizer.

A base model is named by a folder, by the id of a model on the hub (and there by a revision), or by the name of a model
that comes inside a Python package. Whoever opens one asks here, so that every command takes the same names.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel

from rankwise.embedded_models import EMBEDDED as EMBEDDED
from rankwise.embedded_models import locate as locate
from rankwise.errors import ArgumentError

MODEL_OF_TASK = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "IMAGE_CLS": "ImageClassification",
    "MULTIPLE_CHOICE": "MultipleChoice",
}
"""What transformers calls the models of PEFT's tasks, and of two that PEFT has no name for."""

PLACES = "be a folder, hub id or embedded model"
"""How messages say what may name a base model."""


def model_folder(
    name: str | Path, revision: str | None = None, *, files: list[str] | None = None, argument: str = "base"
) -> Path:
    """The folder with a base model's files, downloaded first where `name` is a hub id.

    Args:
        name: the base model.
        revision: of a model on the hub; a folder has none.
        files: patterns of what is wanted of a hub model; by default every file.
        argument: what a message calls the name.

    Raises:
        ArgumentError: there is no such folder and no such model on the hub or in its cache.
    """
    place = locate(name, argument=argument)
    if Path(place).is_dir():
        return Path(place)
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise ArgumentError(argument, PLACES, _with_revision(name, revision)) from error


def skeleton(
    name: str | Path,
    task: str | None = None,
    *,
    revision: str | None = None,
    trained_as: str | None = None,
    argument: str = "base",
    **settings: Any,
) -> nn.Module:
    """The modules of a base model without its weights, on the meta device: of transformers or of diffusers.

    Args:
        name: the base model.
        task: PEFT's name of the task, which decides the head.
        revision: of a model on the hub.
        trained_as: the model class that an adapter says it was trained on.
        argument: what a message calls the name.
        settings: entries of the model's config to replace.

    Raises:
        ArgumentError: its config does not open, or no model class takes it.
    """
    place = locate(name, argument=argument)
    # diffusers' models say their class in a config of their own kind, which transformers cannot read.
    own_config = Path(place) / "config.json"
    try:
        told = json.loads(own_config.read_text(encoding="utf-8")) if own_config.is_file() else {}
        with init_empty_weights():
            if isinstance(told, dict) and "_class_name" in told:
                return getattr(importlib.import_module("diffusers"), told["_class_name"]).from_config(told)
            config = AutoConfig.from_pretrained(place, revision=revision or "main", **settings)
            cls = model_class(config, task, trained_as)
            if hasattr(cls, "from_config"):
                return cls.from_config(config)
            # The language model of a multimodal model takes a part of its config.
            is_text_alone = cls.config_class == config.sub_configs.get("text_config")
            return cls(config.get_text_config() if is_text_alone else config)
    except (OSError, ValueError, AttributeError) as error:
        raise ArgumentError(argument, f"{PLACES} that opens", _with_revision(name, revision)) from error
    except ImportError as error:
        raise ArgumentError(
            argument, "come with diffusers installed, since it is one of its models", str(name)
        ) from error


def open_model(
    name: str | Path,
    task: str | None = None,
    *,
    revision: str | None = None,
    trained_as: str | None = None,
    argument: str = "base",
    **settings: Any,
) -> PreTrainedModel:
    """A base model with its weights; the arguments are those of `skeleton`, and `settings` may hold `dtype`.

    Raises:
        ArgumentError: it does not open.
    """
    place = locate(name, argument=argument)
    try:
        config = AutoConfig.from_pretrained(place, revision=revision or "main")
        cls = model_class(config, task, trained_as)
        return cls.from_pretrained(place, revision=revision or "main", **settings)
    except (OSError, ValueError) as error:
        raise ArgumentError(argument, f"{PLACES} that opens", _with_revision(name, revision)) from error


def open_tokenizer(name: str | Path, *, revision: str | None = None, argument: str = "base") -> Any:
    """The tokenizer of a model; one without a padding token pads with its end token.

    Raises:
        ArgumentError: it does not open, or has no vocabulary.
    """
    place = locate(name, argument=argument)
    rule = f"{PLACES} with a tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise ArgumentError(argument, rule, _with_revision(name, revision)) from error
    # For a folder without a vocabulary, transformers makes up a tokenizer that knows its special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ArgumentError(argument, rule, _with_revision(name, revision))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_type(name: str | Path, *, argument: str = "base") -> str:
    """The kind of a base model by its config, as `bert` or `llama`.

    Raises:
        ArgumentError: its config does not open.
    """
    try:
        return AutoConfig.from_pretrained(locate(name, argument=argument)).model_type
    except (OSError, ValueError) as error:
        raise ArgumentError(argument, f"{PLACES} that opens", str(name)) from error


def open_image_processor(name: str | Path, *, argument: str = "base") -> Any:
    """What makes a model's inputs of images; by pillow, so that pixels are the same on every machine.

    Raises:
        ArgumentError: it does not open, or works with torchvision alone.
    """
    place = locate(name, argument=argument)
    try:
        return AutoImageProcessor.from_pretrained(place, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        rule = f"{PLACES} with an image processor that pillow is enough for"
        raise ArgumentError(argument, rule, str(name)) from error


def model_class(config: PretrainedConfig, task: str | None = None, trained_as: str | None = None) -> Any:
    """The class whose modules an adapter names.

    It is the class that the adapter says it was trained on, where it says one; else the config's own, unless the task
    wants another head; else the automatic class of the task.
    """
    trained_class = getattr(transformers, trained_as, None) if trained_as else None
    if isinstance(trained_class, type) and issubclass(trained_class, PreTrainedModel):
        return trained_class
    own_classes = (getattr(transformers, name, None) for name in config.architectures or ())
    own_class = next((cls for cls in own_classes if cls is not None), None)
    kind = MODEL_OF_TASK.get(task or "")
    if own_class is not None and (kind is None or own_class.__name__.endswith(kind)):
        return own_class
    return getattr(transformers, f"AutoModelFor{kind}") if kind else AutoModel


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    return sorted(folder.glob("model*.safetensors"))


def _with_revision(name: str | Path, revision: str | None) -> str:
    """A base model as messages name it."""
    return f"{name} at revision {revision}" if revision else str(name)
