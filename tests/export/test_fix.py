"""A mended adapter computes, in stock PEFT, what the adapter computed before its files were broken."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import rankwise
from rankwise.cli.main import app
from rankwise.errors import ArgumentError, RankwiseError
from rankwise.export.check import check_export
from tiny_models import PIXELS, TOKENS, answers, bert, llama, mixtral, noise, roberta, saved_adapter, saved_base, vit

TENSORS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A = f"{Q}.lora_A.weight"
PREFIX = "base_model.model."
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base") / "llama", llama)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    return saved_adapter(tmp_path_factory.mktemp("whole") / "lora", model, target_modules=["q_proj", "v_proj"])


def logits(base: Path, adapter: Path, cls: Any = tf.AutoModelForCausalLM, inputs: Any = TOKENS) -> Tensor:
    torch.manual_seed(2)
    return answers(PeftModel.from_pretrained(cls.from_pretrained(base), str(adapter)), inputs)


def broken(whole: Path, folder: Path, change: Callable[[Tensors], Tensors], **entries: Any) -> Path:
    """A copy of an adapter with other tensors, and other entries of its config."""
    shutil.copytree(whole, folder)
    save_file({key: t.contiguous() for key, t in change(load_file(whole / TENSORS)).items()}, folder / TENSORS)
    config = json.loads((whole / CONFIG).read_text()) | entries
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def keys(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(key): t for key, t in tensors.items()}


def within(wrapper: str) -> Callable[[str], str]:
    return lambda key: key.replace(PREFIX, f"{PREFIX}{wrapper}.")


def named(adapter: str) -> Callable[[str], str]:
    return lambda key: key.replace(".weight", f".{adapter}.weight")


BROKEN: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "compiled within": (within("_orig_mod"), ["took the wrapper's name '_orig_mod' out of 8 keys"]),
    "compiled around": (lambda key: f"_orig_mod.{key}", ["took the wrapper's name '_orig_mod' out of 8 keys"]),
    "DDP": (lambda key: f"module.{key}", ["took the wrapper's name 'module' out of 8 keys"]),
    "FSDP of each layer": (
        lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        ["took the wrapper's name '_fsdp_wrapped_module' out of 8 keys"],
    ),
    "DDP of a compiled model": (
        lambda key: within("module._orig_mod")(key),
        ["took the wrapper's name 'module' out of 8 keys", "took the wrapper's name '_orig_mod' out of 8 keys"],
    ),
    "default": (named("default"), ["took the adapter's name 'default' out of 8 keys"]),
    "another adapter's name": (named("sft"), ["took the adapter's name 'sft' out of 8 keys"]),
    "no prefix": (lambda key: key.removeprefix(PREFIX), [f"put {PREFIX} before 8 keys"]),
    "all together": (
        lambda key: "module." + named("default")(key.removeprefix(PREFIX)),
        [
            "took the wrapper's name 'module' out of 8 keys",
            "took the adapter's name 'default' out of 8 keys",
            f"put {PREFIX} before 8 keys",
        ],
    ),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_names_are_mended(kind: str, base: Path, whole: Path, tmp_path: Path) -> None:
    change, told = BROKEN[kind]
    adapter = broken(whole, tmp_path / "in", keys(change))
    report = rankwise.fix_adapter(adapter, tmp_path / "out", base=base)
    assert [sentence.partition(",")[0] for sentence in report.changes] == told
    assert torch.equal(logits(base, tmp_path / "out"), logits(base, whole))
    assert load_file(tmp_path / "out" / TENSORS).keys() == load_file(whole / TENSORS).keys()
    assert (tmp_path / "out" / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    assert (tmp_path / "out" / "README.md").read_bytes() == (whole / "README.md").read_bytes()
    # PEFT reads the keys of `default`, and takes others for somebody else's.
    read_by_peft = kind == "default"
    assert (report.logits_error, report.not_compared is None) == (0.0 if read_by_peft else None, read_by_peft)
    assert all(check_export(tmp_path / "out", name, base=base).problems == [] for name in ("peft", "vllm"))


def test_nothing_to_mend(base: Path, whole: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ArgumentError, match="`out` must not exist yet"):
        rankwise.fix_adapter(whole, out)
    report = rankwise.fix_adapter(whole, out, base=base, overwrite=True)
    assert (report.changes, report.logits_error, report.not_compared) == ((), 0.0, None)
    assert (out / CONFIG).read_bytes() == (whole / CONFIG).read_bytes()
    assert torch.equal(logits(base, out), logits(base, whole))
    with pytest.raises(ArgumentError, match="`out` must be another folder"):
        rankwise.fix_adapter(whole, whole, overwrite=True)


def test_the_config_is_mended_with_the_names(base: Path, tmp_path: Path) -> None:
    model: Any = torch.compile(tf.AutoModelForCausalLM.from_pretrained(base))
    targets = ["_orig_mod.model.layers.0.self_attn.q_proj", "v_proj"]
    pattern = {"_orig_mod.model.layers.0.self_attn.q_proj": 3}
    adapter = saved_adapter(tmp_path / "in", model, target_modules=targets, rank_pattern=pattern)
    report = rankwise.fix_adapter(adapter, tmp_path / "out", base=base)
    assert [change.partition(", which")[0] for change in report.changes[1:]] == [
        f"took wrappers' names out of target_modules in {CONFIG}",
        f"took wrappers' names out of rank_pattern in {CONFIG}",
        f"took the base model's class out of {CONFIG}",
    ]
    fresh: Any = torch.compile(tf.AutoModelForCausalLM.from_pretrained(base))
    adapted: Any = PeftModel.from_pretrained(fresh, str(adapter))
    wanted = answers(adapted.base_model.model._orig_mod, TOKENS)
    torch.testing.assert_close(logits(base, tmp_path / "out"), wanted)
    assert (wanted - answers(tf.AutoModelForCausalLM.from_pretrained(base), TOKENS)).abs().max() > 0.1


def test_a_pickle_becomes_safetensors(base: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "in")
    (tmp_path / "in" / TENSORS).unlink()
    tensors = load_file(whole / TENSORS)
    # Tensors of a pickle may share memory, and lie in it in any order.
    tensors[A] = tensors[A].T.contiguous().T
    torch.save(tensors, tmp_path / "in" / PICKLE)
    report = rankwise.fix_adapter(tmp_path / "in", tmp_path / "out", base=base)
    assert report.changes == (f"read {PICKLE}, a pickle, and wrote {TENSORS}",)
    assert report.logits_error == 0.0
    assert not (tmp_path / "out" / PICKLE).exists()
    assert torch.equal(logits(base, tmp_path / "out"), logits(base, whole))


MARKER = Path("/tmp") / "rankwise-fix-marker"


class Payload:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (MARKER,))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({A: Payload()}, "holds no tensors that torch reads with weights_only=True"),
        ([1, 2], "must hold tensors under their names; found a list"),
        ({"state_dict": {A: 1}}, "must hold tensors under their names; found 'state_dict', a dict"),
    ],
)
def test_a_pickle_of_other_things_is_refused(content: Any, sentence: str, whole: Path, tmp_path: Path) -> None:
    MARKER.unlink(missing_ok=True)
    shutil.copytree(whole, tmp_path / "in")
    (tmp_path / "in" / TENSORS).unlink()
    for write in (torch.save, lambda made, path: path.write_bytes(pickle.dumps(made))):
        write(content, tmp_path / "in" / PICKLE)
        with pytest.raises(RankwiseError, match=r"weights_only|under their names") as refused:
            rankwise.fix_adapter(tmp_path / "in", tmp_path / "out")
        if write is torch.save:
            assert sentence in str(refused.value)
    assert not MARKER.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def in_dtype(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: t.to(dtype) for key, t in tensors.items()}


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
def test_the_dtype_is_kept_or_chosen(stored: torch.dtype, asked: str | None, whole: Path, tmp_path: Path) -> None:
    adapter = broken(whole, tmp_path / "in", in_dtype(stored))
    report = rankwise.fix_adapter(adapter, tmp_path / "out", dtype=asked)
    wanted = stored if asked is None else getattr(torch, asked)
    before, after = load_file(adapter / TENSORS), load_file(tmp_path / "out" / TENSORS)
    assert {t.dtype for t in after.values()} == {wanted}
    assert all(torch.equal(before[key].to(wanted).float(), t.float()) for key, t in after.items())
    names = [str(dtype).removeprefix("torch.") for dtype in (stored, wanted)]
    assert report.changes == (() if stored == wanted else (f"turned 8 tensors of {names[0]} into {names[1]}",))


def test_float8_in_float32_computes_the_same(base: Path, whole: Path, tmp_path: Path) -> None:
    adapter = broken(whole, tmp_path / "in", in_dtype(torch.float8_e4m3fn))
    report = rankwise.fix_adapter(adapter, tmp_path / "out", base=base, dtype="float32")
    assert report.logits_error == 0.0
    assert torch.equal(logits(base, tmp_path / "out"), logits(base, adapter))
    rounded = rankwise.fix_adapter(whole, tmp_path / "rounded", base=base, dtype="float16")
    found, wanted = logits(base, tmp_path / "rounded"), logits(base, whole)
    assert rounded.logits_error is not None
    assert 0 < rounded.logits_error < 1e-2
    assert 0 < (found - wanted).abs().max() / wanted.abs().max() < 1e-2


OTHER_KINDS: dict[str, tuple[Callable[[], Any], Any, Any, dict[str, Any]]] = {
    "DoRA": (llama, tf.AutoModelForCausalLM, TOKENS, {"use_dora": True}),
    "rsLoRA": (llama, tf.AutoModelForCausalLM, TOKENS, {"use_rslora": True, "rank_pattern": {"q_proj": 3}}),
    "embedding": (llama, tf.AutoModelForCausalLM, TOKENS, {"target_modules": ["embed_tokens", "q_proj"]}),
    "trained head": (llama, tf.AutoModelForCausalLM, TOKENS, {"modules_to_save": ["lm_head"]}),
    "token rows": (llama, tf.AutoModelForCausalLM, TOKENS, {"trainable_token_indices": [4, 5]}),
    "experts": (mixtral, tf.AutoModelForCausalLM, TOKENS, {"target_parameters": ["experts.down_proj"]}),
    "biases": (bert, tf.AutoModelForSequenceClassification, TOKENS, {"bias": "lora_only", "task_type": "SEQ_CLS"}),
    "LoRA's biases": (bert, tf.AutoModelForSequenceClassification, TOKENS, {"lora_bias": True}),
    "convolution": (vit, tf.AutoModelForImageClassification, PIXELS, {"target_modules": ["projection", "query"]}),
}


@pytest.mark.parametrize("kind", list(OTHER_KINDS))
def test_every_kind_of_lora_keeps_all_its_tensors(kind: str, tmp_path: Path) -> None:
    make, cls, inputs, given = OTHER_KINDS[kind]
    base = saved_base(tmp_path / "base", make)
    targets = ["query", "value"] if make is bert else ["q_proj", "v_proj"]
    fields: dict[str, Any] = {"target_modules": targets} | given
    whole = saved_adapter(tmp_path / "whole", cls.from_pretrained(base), **fields)
    adapter = broken(whole, tmp_path / "in", keys(within("_orig_mod")))
    rankwise.fix_adapter(adapter, tmp_path / "out", base=base)
    wanted, found = load_file(whole / TENSORS), load_file(tmp_path / "out" / TENSORS)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], t) for key, t in wanted.items())
    assert torch.equal(logits(base, tmp_path / "out", cls, inputs), logits(base, whole, cls, inputs))


def test_copies_of_trained_biases_are_left_out(tmp_path: Path) -> None:
    """PEFT writes the biases inside of a head trained in full twice, once with the adapter's name in the key."""
    base, cls = saved_base(tmp_path / "base", roberta), tf.AutoModelForSequenceClassification
    fields: dict[str, Any] = {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}
    whole = saved_adapter(tmp_path / "whole", cls.from_pretrained(base), **fields)
    assert any(IN_FULL in key for key in load_file(whole / TENSORS))
    report = rankwise.fix_adapter(whole, tmp_path / "out", base=base)
    assert any("a second copy of a module trained in full" in change for change in report.changes)
    assert torch.equal(logits(base, tmp_path / "out", cls, TOKENS), logits(base, whole, cls, TOKENS))


@pytest.mark.parametrize("adapter", ["default", "sft"])
def test_a_filtered_state_dict_is_mended(adapter: str, base: Path, tmp_path: Path) -> None:
    """A part of `model.state_dict()`, which somebody saved without PEFT, has the adapter's name in every key."""
    fields: dict[str, Any] = {"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    model = PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(base),
        str(saved_adapter(tmp_path / "whole", tf.AutoModelForCausalLM.from_pretrained(base), **fields)),
        adapter_name=adapter,
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "in")
    (tmp_path / "in" / TENSORS).unlink()
    parts = ("lora_", "modules_to_save", "original_module")
    state = {name: t for name, t in model.state_dict().items() if any(part in name for part in parts)}
    torch.save(state, tmp_path / "in" / PICKLE)
    report = rankwise.fix_adapter(tmp_path / "in", tmp_path / "out", base=base)
    assert f"took the adapter's name {adapter!r} out of 7 keys" in report.changes[1]
    assert "left out 'base_model.model.lm_head.original_module.weight'" in report.changes[2]
    assert torch.equal(logits(base, tmp_path / "out"), logits(base, tmp_path / "whole"))


def test_an_adapter_of_rankwise_is_mended(base: Path, tmp_path: Path) -> None:
    config = rankwise.SoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_weights=False)
    get_peft_model(tf.AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "whole"))
    adapter = broken(tmp_path / "whole", tmp_path / "in", keys(within("_orig_mod")))
    report = rankwise.fix_adapter(adapter, tmp_path / "out", base=base)
    assert report.changes[0].startswith("took the wrapper's name '_orig_mod' out of")
    assert torch.equal(logits(base, tmp_path / "out"), logits(base, tmp_path / "whole"))
    assert rankwise.fix_adapter(tmp_path / "whole", tmp_path / "same", base=base).logits_error == 0.0
    with pytest.raises(ArgumentError, match="`dtype` must be left out for an adapter of rankwise's"):
        rankwise.fix_adapter(tmp_path / "whole", tmp_path / "half", dtype="float16")


def beside(key: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: tensor}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "two names": (
        lambda tensors: tensors | {f"_orig_mod.{key}": t + 1 for key, t in tensors.items()},
        {},
        "holds one tensor under two names, ",
    ),
    "two names of another tensor": (
        lambda tensors: (
            tensors | {f"{PREFIX}lm_head{part}.weight": noise(64, 32) + len(part) for part in ("", IN_FULL)}
        ),
        {"modules_to_save": ["lm_head"]},
        "holds one tensor under two names, ",
    ),
    "an unknown wrapper": (keys(lambda key: f"wrapper.{key}"), {}, "'wrapper.' is none of the wrappers known here"),
    "a stray key": (
        beside(f"{Q}.optimizer_state", torch.ones(2)),
        {},
        "holds 'model.layers.0.self_attn.q_proj.optimizer_state', which is no part of the adapter",
    ),
    "magnitudes without DoRA": (
        beside(f"{Q}.lora_magnitude_vector", torch.ones(32)),
        {},
        "lora_magnitude_vector', which",
    ),
    "another alpha": (
        beside(f"{Q}.alpha", torch.tensor(5.0)),
        {},
        "holds 'model.layers.0.self_attn.q_proj.alpha', 5, and adapter_config.json says 3: which is it?",
    ),
    "NaN": (beside(A, torch.full((2, 32), torch.nan)), {}, f"holds NaN or infinity in {A!r}"),
    "another rank": (lambda tensors: tensors, {"r": 3}, "cannot be mended here: .* should have rank 3 by the config"),
    "half an update": (lambda tensors: {k: t for k, t in tensors.items() if k != A}, {}, "has only its B"),
    "another kind": (lambda tensors: tensors, {"peft_type": "LOHA"}, "its peft_type is 'LOHA'"),
}
IN_FULL = ".modules_to_save.default"


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_cannot_be_mended_is_refused(kind: str, whole: Path, tmp_path: Path) -> None:
    change, entries, sentence = REFUSED[kind]
    adapter = broken(whole, tmp_path / "in", change, **entries)
    with pytest.raises(RankwiseError, match=sentence):
        rankwise.fix_adapter(adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_alpha_that_repeats_the_config_is_left_out(base: Path, whole: Path, tmp_path: Path) -> None:
    adapter = broken(whole, tmp_path / "in", beside(f"{Q}.alpha", torch.tensor(3.0)))
    report = rankwise.fix_adapter(adapter, tmp_path / "out", base=base)
    assert report.changes == (f"left out '{Q}.alpha', which repeats the lora_alpha of {CONFIG}",)
    assert torch.equal(logits(base, tmp_path / "out"), logits(base, whole))


def test_a_number_too_large_for_the_dtype_is_refused(whole: Path, tmp_path: Path) -> None:
    adapter = broken(whole, tmp_path / "in", lambda tensors: {key: t * 1e6 for key, t in tensors.items()})
    with pytest.raises(RankwiseError, match=r"would hold NaN or infinity in torch\.float16"):
        rankwise.fix_adapter(adapter, tmp_path / "out", dtype="float16")
    with pytest.raises(ArgumentError, match="`dtype` must be one of float32, bfloat16, float16; found 'int8'"):
        rankwise.fix_adapter(adapter, tmp_path / "out", dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_base_model_is_refused(whole: Path, tmp_path: Path) -> None:
    other = saved_base(tmp_path / "other", lambda: llama(num_hidden_layers=1))
    with pytest.raises(RankwiseError, match=r"cannot be mended here: .*layers\.1\."):
        rankwise.fix_adapter(whole, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_changed(base: Path, whole: Path, tmp_path: Path) -> None:
    adapter = broken(whole, tmp_path / "in", keys(within("_orig_mod")))

    def printed(*arguments: str | Path) -> list[str]:
        done = CliRunner().invoke(app, ["fix", *map(str, arguments)])
        assert done.exception is None
        return done.output.splitlines()

    first = printed(adapter, "--out", tmp_path / "out", "--dtype", "bfloat16", "--base", base)
    key = A.replace(PREFIX, f"{PREFIX}_orig_mod.")
    assert first[:2] == [
        f"took the wrapper's name '_orig_mod' out of 8 keys, as {key!r}",
        "turned 8 tensors of float32 into bfloat16",
    ]
    assert first[2].startswith("logits   were not compared: PEFT does not read the input as it is (")
    assert first[3] == f"adapter  {tmp_path / 'out'}"
    again = printed(tmp_path / "out", "--out", tmp_path / "again", "--base", base)
    assert again == ["nothing to mend", "logits   differ by 0.0e+00 of their largest", f"adapter  {tmp_path / 'again'}"]
