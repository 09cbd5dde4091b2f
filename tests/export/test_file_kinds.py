"""What every command makes of every kind of adapter file: the table in docs/serving.md, held equal to the outcomes.

Each cell runs the command. Where it succeeds, what it wrote or printed is compared with what stock PEFT or diffusers
computes with the file as it was meant. `python tests/export/test_file_kinds.py` rewrites the table.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_serving_page import PAGE, markdown, replaced
from torch import Tensor
from typer.testing import CliRunner

import pipelines
import rankwise
from rankwise.cli.main import app
from rankwise.errors import RankwiseError
from tiny_models import (
    PIXELS,
    TOKENS,
    answers,
    bert,
    gpt2,
    llama,
    llava,
    mixtral,
    qwen2_5_vl,
    saved_adapter,
    saved_base,
    vit,
)

Tensors = dict[str, Tensor]
Config = dict[str, Any]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEADING = ["kind of file", "`inspect`", "`shrink`", "`merge`", "`merge --into-base`", "`check-export`", "`fix`"]


@dataclass
class Kind:
    """A LoRA of a model of transformers', and what was done to its file."""

    make: Callable[[], Any] = llama
    cls: Any = tf.AutoModelForCausalLM
    inputs: Any = field(default_factory=lambda: TOKENS)
    fields: Config = field(default_factory=dict)
    change: Callable[[Tensors, Config], Any] | None = None
    """Of the file; PEFT understands the file as it was before."""
    server: str = "peft"
    tolerance: float = 2e-3
    """Of a merge: the largest difference, relative to the largest number."""
    is_read_by_peft: bool = False
    """Whether PEFT reads the changed file too, so that it means what PEFT makes of it."""

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The base model's folder and the adapter's, and beside it, as `meant`, what PEFT understands."""
        base = saved_base(folder / "base", self.make)
        model = self.cls.from_pretrained(base)
        fields: Config = {"target_modules": ["q_proj", "v_proj"]} | self.fields
        saved_adapter(folder / "meant", model, **fields)
        self.alter(folder)
        if self.is_read_by_peft:
            shutil.copytree(folder / "lora", folder / "meant", dirs_exist_ok=True)
        return base, folder / "lora"

    def alter(self, folder: Path) -> None:
        tensors, config = load_file(folder / "meant" / TENSORS), json.loads((folder / "meant" / CONFIG).read_text())
        if self.change is not None:
            tensors = self.change(tensors, config) or tensors
        (folder / "lora").mkdir()
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "lora" / TENSORS, {"format": "pt"})
        (folder / "lora" / CONFIG).write_text(json.dumps(config))

    def answer(self, base: Path, adapter: Path) -> Tensor:
        """What PEFT computes with an adapter."""
        torch.manual_seed(2)
        return answers(PeftModel.from_pretrained(self.cls.from_pretrained(base), str(adapter)), self.inputs)

    def answer_merged(self, out: Path) -> Tensor:
        """What a model without an adapter computes."""
        return answers(self.cls.from_pretrained(out), self.inputs)

    def weights(self, base: Path, adapter: Path) -> Tensors:
        """What PEFT's own merge adds to every weight that an update changes."""
        model = self.cls.from_pretrained(base)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        in_full = self.fields.get("modules_to_save") or ["classifier"]
        return {
            name: p.detach() - before[name]
            for name, p in merged.named_parameters()
            if name in before and p.dim() > 1 and not any(module in name for module in in_full)
        }


def as_dtype(dtype: torch.dtype) -> Callable[[Tensors, Config], Any]:
    return lambda tensors, _: {key: t.to(dtype) for key, t in tensors.items()}


def keys(change: Callable[[str], str]) -> Callable[[Tensors, Config], Any]:
    return lambda tensors, _: {change(key): t for key, t in tensors.items()}


def twice(tensors: Tensors, _: Config) -> Tensors:
    return tensors | {key.replace(".weight", ".default.weight"): t + 1 for key, t in tensors.items()}


def beside(key: str, value: Callable[[], Tensor]) -> Callable[[Tensors, Config], Any]:
    return lambda tensors, _: tensors | {f"base_model.model.model.layers.0.self_attn.q_proj.{key}": value()}


def not_finite(tensors: Tensors, _: Config) -> Tensors:
    return {key: t * torch.nan for key, t in tensors.items()}


def with_vits_names_of_old(tensors: Tensors, config: Config) -> Tensors:
    config["target_modules"] = ["query", "value"]
    names = {"vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query"}
    names["attention.v_proj"] = "attention.attention.value"
    for new, old in names.items():
        tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    return tensors


class Headless(Kind):
    """An adapter trained on the model without its head."""

    def write(self, folder: Path) -> tuple[Path, Path]:
        base = saved_base(folder / "base", self.make)
        saved_adapter(folder / "meant", tf.AutoModel.from_pretrained(base), target_modules=["q_proj", "v_proj"])
        self.alter(folder)
        return base, folder / "lora"


class Pickled(Kind):
    """Only a pickle."""

    def alter(self, folder: Path) -> None:
        (folder / "lora").mkdir()
        (folder / "lora" / CONFIG).write_text((folder / "meant" / CONFIG).read_text())
        torch.save(load_file(folder / "meant" / TENSORS), folder / "lora" / "adapter_model.bin")


class WithEmbeddings(Kind):
    """PEFT saved the base model's embeddings beside the adapter."""

    def alter(self, folder: Path) -> None:
        model = PeftModel.from_pretrained(self.cls.from_pretrained(folder / "base"), str(folder / "meant"))
        model.save_pretrained(str(folder / "lora"), save_embedding_layers=True)


class Ours(Kind):
    """An adapter of rankwise's."""

    def write(self, folder: Path) -> tuple[Path, Path]:
        base = saved_base(folder / "base", self.make)
        config = rankwise.SoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False)
        get_peft_model(self.cls.from_pretrained(base), config).save_pretrained(str(folder / "lora"))
        (folder / "meant").symlink_to(folder / "lora")
        return base, folder / "lora"


class OfPipeline(Kind):
    """A LoRA of a pipeline of diffusers'."""

    def __init__(
        self,
        tensors: Callable[[pipelines.Updates], Tensors],
        header: Any = None,
        only: str = "",
        tiny: pipelines.TinyPipeline = pipelines.SD,
    ) -> None:
        super().__init__(server="diffusers")
        self.tensors, self.header, self.only, self.tiny = tensors, header, only, tiny

    def write(self, folder: Path) -> tuple[Path, Path]:
        base = self.tiny.save(folder / "base")
        given = {name: pair for name, pair in self.tiny.updates().items() if name.startswith(self.only)}
        pipelines.write(folder / "lora", self.tensors(given), self.header)
        (folder / "meant").symlink_to(folder / "lora")
        return base, folder / "lora"

    def answer(self, base: Path, adapter: Path) -> Tensor:
        return torch.cat([t.flatten() for t in self.tiny.loaded(adapter)])

    def answer_merged(self, out: Path) -> Tensor:
        found = {name: type(model).from_pretrained(out / name) for name, model in self.tiny.components().items()}
        return torch.cat([t.flatten() for t in self.tiny.answers(found)])

    def weights(self, base: Path, adapter: Path) -> Tensors:
        before = self.tiny.components()
        after = self.tiny.fused(adapter)
        return {
            f"{component}.{name}": dict(after[component].named_parameters())[name].detach() - p.detach()
            for component, model in before.items()
            for name, p in model.named_parameters()
        }


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = {"target_modules": ["query", "value"]}
KINDS: dict[str, Kind] = {
    "plain LoRA": Kind(),
    "rsLoRA, ranks and alphas by module": Kind(
        fields={"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}}
    ),
    "Conv1D of GPT-2": Kind(gpt2, fields={"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "classifier with its head": Kind(
        bert, tf.AutoModelForSequenceClassification, fields=ATTENTION | {"task_type": "SEQ_CLS"}
    ),
    "convolution of ViT": Kind(
        vit, tf.AutoModelForImageClassification, PIXELS, {"target_modules": ["projection", "query"]}
    ),
    "embedding": Kind(fields={"target_modules": ["embed_tokens", "q_proj"]}),
    "head trained in full": Kind(fields={"modules_to_save": ["lm_head"]}),
    "embedding trained in full, tied model": Kind(
        lambda: llama(tie_word_embeddings=True), fields={"modules_to_save": ["embed_tokens"]}
    ),
    "DoRA": Kind(fields={"use_dora": True}),
    "biases of LoRA": Kind(fields={"lora_bias": True}),
    "biases of the model": Kind(bert, tf.AutoModelForSequenceClassification, fields=ATTENTION | {"bias": "lora_only"}),
    "rows of an embedding": Kind(fields={"trainable_token_indices": [1, 2]}),
    "fused experts (`target_parameters`)": Kind(mixtral, fields={"target_parameters": EXPERTS}),
    "PiSSA": Kind(change=lambda _, config: config.update(init_lora_weights="pissa")),
    "bfloat16": Kind(change=as_dtype(torch.bfloat16), is_read_by_peft=True, tolerance=1e-2),
    "float8": Kind(change=as_dtype(torch.float8_e4m3fn), is_read_by_peft=True, tolerance=1e-2),
    "keys with `.default.`": Kind(change=keys(lambda key: key.replace(".weight", ".default.weight"))),
    "keys with `_orig_mod.`": Kind(change=keys(lambda key: f"_orig_mod.{key}")),
    "keys of an unknown wrapper": Kind(change=keys(lambda key: f"wrapper.{key}")),
    "two keys for one tensor": Kind(change=twice),
    "LLaVA": Kind(llava, tf.AutoModelForImageTextToText, fields={"target_modules": r".*language_model.*q_proj"}),
    "LLaVA, names before transformers 4.52": Kind(
        llava,
        tf.AutoModelForImageTextToText,
        fields={"target_modules": r".*language_model.*q_proj"},
        change=keys(lambda key: key.replace("model.language_model.layers", "language_model.model.layers")),
    ),
    "Qwen2.5-VL, names before transformers 4.52": Kind(
        qwen2_5_vl,
        tf.AutoModelForImageTextToText,
        fields={"target_modules": ["q_proj", "v_proj"]},
        change=keys(lambda key: key.replace("model.language_model.layers", "model.layers")),
    ),
    "ViT, names before transformers 5": Kind(
        vit,
        tf.AutoModelForImageClassification,
        PIXELS,
        {"target_modules": ["q_proj", "v_proj"]},
        change=with_vits_names_of_old,
    ),
    "trained on AutoModel": Headless(cls=tf.AutoModel),
    "embeddings saved beside it": WithEmbeddings(),
    "alphas beside the tensors": Kind(change=beside("alpha", lambda: torch.tensor(3.0))),
    "a pickle (`adapter_model.bin`)": Pickled(),
    "NaN": Kind(change=not_finite),
    "trained by rankwise (SoRA)": Ours(),
    "diffusers, a UNet": OfPipeline(pipelines.in_diffusers_names, pipelines.headers({"unet": 8.0}), "unet"),
    "diffusers, a UNet and a text encoder": OfPipeline(
        pipelines.in_diffusers_names, pipelines.headers(pipelines.TWO_HEADERS)
    ),
    "kohya, with alphas": OfPipeline(pipelines.in_kohyas_names_with_alphas),
    "kohya of SDXL, with alphas": OfPipeline(
        lambda given: pipelines.in_kohyas_names_of_sdxl(given, pipelines.two_alphas), tiny=pipelines.SDXL
    ),
}


def row(name: str, folder: Path) -> list[str]:
    """The outcome of every command for a kind of file."""
    kind = KINDS[name]
    base, adapter = kind.write(folder)
    cells = [
        inspected(kind, base, adapter),
        shrunk(kind, base, adapter),
        merged(kind, base, adapter),
        merged_into_base(kind, base, adapter),
        checked(kind, base, adapter),
        mended(kind, base, adapter),
    ]
    return [name, *cells]


def ran(*arguments: str | Path) -> tuple[str, str | None]:
    """What a command printed, and why it refused; any other exception is a fault of ours."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is None or isinstance(done.exception, SystemExit):
        return done.output, None
    if not isinstance(done.exception, RankwiseError):
        raise done.exception
    return "", refused(str(done.exception))


def refused(sentence: str) -> str:
    """A refusal as the table has it, without paths."""
    for path, word in ((r"\S*/base\S*", "the base model"), (r"'?\S*/lora[\w./]*'?", "it")):
        sentence = re.sub(path, word, sentence)
    return f"refused because {shortened(sentence)}"


def shortened(sentence: str) -> str:
    """A sentence without the beginnings of modules' names."""
    return re.sub(r"[\w.]+(?=\.q_proj)", "…", sentence).replace("|", "\\|")


def inspected(kind: Kind, base: Path, adapter: Path) -> str:
    printed, why = ran("inspect", adapter)
    if why is not None:
        return why
    norm = re.search(r"update   ‖ΔW‖_F (\S+)", printed)
    assert norm is not None
    assert float(norm[1]) == pytest.approx(norm_of(kind.weights(base, adapter.parent / "meant")), rel=2e-3)
    return "yes"


def shrunk(kind: Kind, base: Path, adapter: Path) -> str:
    out = adapter.parent / "small"
    printed, why = ran("shrink", adapter, "--rank", "1", "--out", out)
    if why is not None:
        return why
    stated = re.search(r"error +(\S+)%", printed)
    assert stated is not None
    before, after = (kind.weights(base, at) for at in (adapter.parent / "meant", out))
    lost = norm_of({name: after[name] - before[name] for name in before}) / norm_of(before)
    assert float(stated[1]) / 100 == pytest.approx(lost, abs=2e-3)
    return "with a stated error"


def merged(kind: Kind, base: Path, adapter: Path) -> str:
    out = adapter.parent / "sum"
    _, why = ran("merge", adapter, adapter, "--base", base, "--out", out)
    if why is not None:
        return why
    meant = kind.answer(base, adapter.parent / "meant")
    assert (kind.answer(base, out) - meant).abs().max() <= kind.tolerance * meant.abs().max()
    return "yes"


def merged_into_base(kind: Kind, base: Path, adapter: Path) -> str:
    out = adapter.parent / "model"
    _, why = ran("merge", adapter, "--into-base", "--base", base, "--out", out)
    if why is not None:
        return why
    meant = kind.answer(base, adapter.parent / "meant")
    assert (kind.answer_merged(out) - meant).abs().max() <= 2e-3 * meant.abs().max()
    return "yes"


def checked(kind: Kind, base: Path, adapter: Path) -> str:
    printed, why = ran("check-export", adapter, "--for", kind.server, "--base", base)
    if why is not None:
        return why
    problems = [line.strip() for line in printed.splitlines()[1:]]
    return f"finds: {shortened(problems[0])}" if problems else "yes"


def mended(kind: Kind, base: Path, adapter: Path) -> str:
    out = adapter.parent / "mended"
    printed, why = ran("fix", adapter, "--base", base, "--out", out)
    if why is not None:
        return why
    if printed.startswith("nothing to mend"):
        before, after = load_file(adapter / TENSORS), load_file(out / TENSORS)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key].float(), t.float()) for key, t in before.items())
        return "nothing to mend"
    meant = kind.answer(base, adapter.parent / "meant")
    assert torch.equal(kind.answer(base, out), meant)
    return "yes"


def norm_of(changes: Tensors) -> float:
    return float(sum(t.double().square().sum() for t in changes.values())) ** 0.5


@pytest.mark.parametrize("name", list(KINDS))
def test_the_table_says_what_the_commands_do(name: str, tmp_path: Path) -> None:
    wanted = f"| {' | '.join(row(name, tmp_path))} |"
    assert wanted in PAGE.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    rows = [HEADING]
    for name in KINDS:
        try:
            rows.append(row(name, Path(tempfile.mkdtemp())))
        except Exception as error:
            print(name, type(error).__name__, str(error)[:300], flush=True)
        else:
            print(rows[-1], flush=True)
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), markdown(rows)), encoding="utf-8")
