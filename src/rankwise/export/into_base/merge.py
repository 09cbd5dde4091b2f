"""`rankwise merge --into-base`: a base model with adapters in its weights.

The base model's modules are opened without their weights, and PEFT puts each adapter on such a skeleton. Then one
module after the other gets its weights from the files, is merged by PEFT in float32, and is written back under the
files' names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rankwise.base_models import model_folder
from rankwise.checks import require_room
from rankwise.export.base import told_base
from rankwise.export.card import write_card
from rankwise.export.combine import given_weights, warn_of_different_bases
from rankwise.export.dtypes import check_dtype
from rankwise.export.into_base.checkpoint import FILES, INDEX
from rankwise.export.into_base.pipeline import merge_into_pipeline
from rankwise.export.into_base.saved import read_saved
from rankwise.export.into_base.whole_model import check_mergeable, library_of, load_code, write_merged
from rankwise.export.lora_config import saved_config
from rankwise.export.pipeline_files import pipeline_file
from rankwise.files import whole_folder

WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
"""The files of a base model on the hub that are fetched; its pickles only where it has no other weights."""


def merge_into_base(
    folders: Sequence[str | Path],
    base: str | Path | None,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the base model with the weighted sum of adapters in its weights: a full model that needs no PEFT.

    W_l + Σ w_i ΔW_i, worked out by PEFT in float32; modules trained in full and rows of embeddings are averaged by the
    weights. One module is in memory at a time, whatever the model's size. Where the config ties the output layer to the
    embeddings and the two come out different, both are written and the config says so.

    Args:
        folders: adapters, plain LoRA or saved by rankwise, in any mix; DoRA alone, with weight 1. Or LoRAs of a
            pipeline of diffusers', whose components are then merged one by one.
        base: the base model's folder, or its name; None: where the first adapter's config says, at its revision.
        out: where to write; missing parents are made.
        weights: one per adapter, by default 1/n each.
        dtype: "float32", "bfloat16" or "float16": what to write; by default each tensor's own.
        overwrite: replace an existing folder.

    Returns:
        `out`.

    Raises:
        ArgumentError: an argument breaks its rule, or `out` exists.
        AdapterFileError: a folder holds no whole adapter, or one that does not fit the base model.
        RankwiseError: the base has no weight for an update, or one of another shape, or quantised ones.

    Example:
        >>> import tempfile, rankwise
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from rankwise.export.into_base.merge import merge_into_base
        >>> folder, sizes = tempfile.mkdtemp(), {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
        >>> llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
        >>> llama.save_pretrained(folder + "/base")
        >>> config = rankwise.SoraConfig(r=2, target_modules=["q_proj"], init_weights=False)
        >>> _ = rankwise.export_lora(get_peft_model(llama, config), folder + "/lora")
        >>> merge_into_base([folder + "/lora"], folder + "/base", folder + "/merged").name
        'merged'
    """
    out = Path(out)
    given = given_weights(weights, len(folders))
    check_dtype(dtype)
    if any(pipeline_file(Path(folder)) is not None for folder in folders):
        return merge_into_pipeline(folders, base, out, given, dtype=dtype, overwrite=overwrite)
    source, revision = told_base(base, saved_config(folders[0]), Path(folders[0]))
    model_at = _fetched(source, revision)
    require_room("out", out, overwrite=overwrite, reads=[*folders, model_at])
    adapters = [read_saved(Path(folder)) for folder in folders]
    warn_of_different_bases(adapter.told for adapter in adapters)
    check_mergeable(model_at)
    with whole_folder(out) as beside:
        model = write_merged(beside, model_at, adapters, given, dtype)
        facts = {
            "Revision": f"`{revision}`" if revision else None,
            "Merged from": ", ".join(f"`{Path(folder).name}`" for folder in folders),
            "Weights": ", ".join(map(str, given)),
        }
        title, library = "A model with LoRAs merged in", library_of(model)
        write_card(beside, out.name, source, title, facts, load=load_code(model), library=library)
    return out


def _fetched(source: str, revision: str | None) -> Path:
    """The base model's folder; its pickles are downloaded only where it has no other weights."""
    folder = model_folder(source, revision, files=WANTED)
    if any((folder / (name + ending)).is_file() for name in FILES for ending in ("", INDEX)):
        return folder
    return model_folder(source, revision, files=[*WANTED, "*.bin"])
