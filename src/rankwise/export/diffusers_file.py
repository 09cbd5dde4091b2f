"""A LoRA in the one file that diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from rankwise.errors import RankwiseError
from rankwise.export.lora_config import CONFIG
from rankwise.export.reader import DIFFUSERS, METADATA, PEFT_PREFIX, TENSORS, read_tensors


def rename_for_diffusers(folder: Path, base_class: str) -> None:
    """A PEFT adapter in diffusers' one file: keys under the component's name, the config in the file's header.

    Raises:
        RankwiseError: the base model is none of diffusers' UNets or transformers.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    component = next(
        (name for part, name in (("UNet", "unet"), ("Transformer", "transformer")) if part in base_class), ""
    )
    if not component:
        raise RankwiseError(
            f"diffusers would not serve this adapter: {base_class} is none of its UNets or transformers"
        )
    tensors = {f"{component}.{key.removeprefix(PEFT_PREFIX)}": t for key, t in read_tensors(folder / TENSORS).items()}
    header = {f"{component}.{key}": value for key, value in config.items()}
    save_file(tensors, folder / DIFFUSERS, {"format": "pt", METADATA: json.dumps(header, indent=2, sort_keys=True)})
    (folder / TENSORS).unlink()
    (folder / CONFIG).unlink()
