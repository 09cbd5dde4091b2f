"""Files that other tools leave behind: wrappers in keys, an adapter's name, narrow dtypes, one tensor under two keys.

The right value is always what stock PEFT computes with the file as it was before its keys or its dtype were changed.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import rankwise
from rankwise.cli.main import app
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.export.into_base.merge import merge_into_base
from rankwise.export.merge import merge_adapters
from rankwise.export.shrink import shrink_adapter
from tiny_models import TOKENS, answers, llama, off, saved_adapter, saved_base

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
Change = Callable[[str], str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("odd") / "base", llama)


@pytest.fixture(scope="module")
def plain(base: Path) -> Path:
    """An adapter as PEFT writes it, with an embedding's update, which has names of its own."""
    targets = ["embed_tokens", "q_proj", "down_proj"]
    saved = saved_adapter(base.parent / "with embeddings", opened(base), r=4, target_modules=targets)
    # PEFT saves the frozen embedding too, which is no part of the update.
    return rewritten(saved, base.parent / "plain", lambda tensors: {k: t for k, t in tensors.items() if "lora" in k})


@pytest.fixture(scope="module")
def other(base: Path) -> Path:
    return saved_adapter(base.parent / "other", opened(base), seed=1, target_modules=["q_proj", "down_proj"])


def opened(base: Path) -> Any:
    return tf.LlamaForCausalLM.from_pretrained(base)


def answer(base: Path, adapter: Path) -> Tensor:
    return answers(PeftModel.from_pretrained(opened(base), str(adapter)), TOKENS)


def deltas(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What stock PEFT adds to every weight."""
    before = dict(opened(base).named_parameters())
    merged: Any = PeftModel.from_pretrained(opened(base), str(adapter)).merge_and_unload()
    return {name: (p - before[name]).detach() for name, p in merged.named_parameters()}


def norm(changes: dict[str, Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in changes.values())) ** 0.5


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(source, folder)
    tensors = change(load_file(source / TENSORS))
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / TENSORS, {"format": "pt"})
    return folder


def with_keys(change: Change) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {change(key): t.clone() for key, t in tensors.items()}


def named_default(key: str) -> str:
    """As the keys are in a model: an embedding's are parameters, a linear layer's are modules with a weight."""
    return f"{key}.default" if "lora_embedding_" in key else key.replace(".weight", ".default.weight")


def inside_layers(wrapper: str) -> Change:
    """Every decoder layer wrapped, as FSDP and activation checkpointing do."""
    return lambda key: re.sub(r"(layers\.\d+)\.", rf"\1.{wrapper}.", key)


KEYS: dict[str, Change] = {
    "torch.compile of the adapted model": lambda key: f"_orig_mod.{key}",
    "torch.compile of the base model": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "torch.compile of each layer": inside_layers("_orig_mod"),
    "DDP": lambda key: f"module.{key}",
    "DDP of the base model": lambda key: key.replace(PREFIX, f"{PREFIX}module."),
    "DDP of a compiled model": lambda key: f"module._orig_mod.{key}",
    "FSDP": lambda key: f"_fsdp_wrapped_module.{inside_layers('_fsdp_wrapped_module')(key)}",
    "activation checkpointing": inside_layers("_checkpoint_wrapped_module"),
    "the adapter's name": named_default,
    "another adapter's name": lambda key: named_default(key).replace("default", "mine"),
    "the adapter's name in a compiled model": lambda key: f"_orig_mod.{named_default(key)}",
}
UNDERSTOOD_BY_PEFT = {"the adapter's name"}


@pytest.mark.filterwarnings("ignore:.* holds (wrappers' names|an adapter's name)")
@pytest.mark.parametrize("kind", list(KEYS))
def test_keys_are_read_without_what_others_put_into_them(
    kind: str, base: Path, plain: Path, other: Path, tmp_path: Path
) -> None:
    odd = rewritten(plain, tmp_path / "odd", with_keys(KEYS[kind]))
    wanted, whole = answer(base, plain), deltas(base, plain)

    printed = CliRunner().invoke(app, ["inspect", str(odd)])
    assert printed.exception is None
    assert float(re.findall(r"update   ‖ΔW‖_F (\S+)", printed.output)[0]) == pytest.approx(norm(whole), rel=1e-3)

    shrink_adapter(odd, tmp_path / "same", energy=1.0)
    assert off(answer(base, tmp_path / "same"), wanted) <= 1e-5

    merge_adapters([odd, other], tmp_path / "sum", weights=[0.7, 0.3])
    added, found = deltas(base, other), deltas(base, tmp_path / "sum")
    for name, W in whole.items():
        torch.testing.assert_close(found[name], 0.7 * W + 0.3 * added[name], rtol=1e-4, atol=1e-5)

    taken = rankwise.import_lora(opened(base), odd, rankwise.LoraConfig(r=4))
    assert off(answers(taken, TOKENS), wanted) <= 1e-5


@pytest.mark.parametrize("kind", list(KEYS))
def test_check_export_says_whether_peft_reads_the_keys(kind: str, base: Path, plain: Path, tmp_path: Path) -> None:
    odd = rewritten(plain, tmp_path / "odd", with_keys(KEYS[kind]))
    rules = {problem.rule for problem in rankwise.check_export(odd, "peft", base=base).problems}
    understood = torch.equal(answer(base, odd), answer(base, plain))
    assert understood == (kind in UNDERSTOOD_BY_PEFT)
    assert bool(rules) == (not understood), rules


def test_what_was_left_out_of_keys_is_told(plain: Path, tmp_path: Path) -> None:
    odd = rewritten(plain, tmp_path / "odd", with_keys(KEYS["DDP of a compiled model"]))
    with pytest.warns(UserWarning, match="holds wrappers' names, which are left out, in 10 of its keys"):
        shrink_adapter(odd, tmp_path / "small", rank=1)
    odd = rewritten(plain, tmp_path / "mine", with_keys(KEYS["another adapter's name"]))
    with pytest.warns(UserWarning, match="holds an adapter's name, which is left out"):
        shrink_adapter(odd, tmp_path / "smaller", rank=1)


REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "a wrapper that nobody knows": ("'wrapper.' is none of the wrappers", with_keys(lambda key: f"wrapper.{key}")),
    "a wrapped key beside a plain one": (
        "one tensor under two names",
        lambda tensors: tensors | {f"_orig_mod.{key}": t + 1 for key, t in tensors.items()},
    ),
    "a named key beside a plain one": (
        "one tensor under two names",
        lambda tensors: tensors | {named_default(key): t + 1 for key, t in tensors.items()},
    ),
    "two adapters' keys": (
        "one tensor under two names",
        lambda tensors: {
            named_default(key).replace("default", name): t.clone() for key, t in tensors.items() for name in "ab"
        },
    ),
    "a key without prefix beside a plain one": (
        "one tensor under two names",
        lambda tensors: tensors | {key.removeprefix(PREFIX): t + 1 for key, t in tensors.items()},
    ),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_could_mean_two_things_is_refused_everywhere(kind: str, base: Path, plain: Path, tmp_path: Path) -> None:
    message, change = REFUSED[kind]
    odd = rewritten(plain, tmp_path / "odd", change)
    calls: list[Callable[[], Any]] = [
        lambda: shrink_adapter(odd, tmp_path / "small", rank=1),
        lambda: merge_adapters([odd, plain], tmp_path / "sum"),
        lambda: rankwise.import_lora(opened(base), odd, rankwise.LoraConfig(r=4)),
    ]
    for call in calls:
        with pytest.raises(AdapterFileError, match=message):
            call()
    error = CliRunner().invoke(app, ["inspect", str(odd)]).exception
    assert isinstance(error, AdapterFileError)
    assert message in str(error)
    assert rankwise.check_export(odd, "peft", base=base).problems
    assert {path.name for path in tmp_path.iterdir()} == {"odd"}


@pytest.mark.parametrize(("alpha", "agrees"), [(3.0, True), (7.0, False)])
def test_scales_beside_the_tensors_are_left_out_as_peft_leaves_them_out(
    alpha: float, agrees: bool, base: Path, plain: Path, tmp_path: Path
) -> None:
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.alpha"
    odd = rewritten(plain, tmp_path / "odd", lambda tensors: tensors | {key: torch.tensor(alpha)})
    wanted = answer(base, plain)
    assert torch.equal(answer(base, odd), wanted)
    for call in (
        lambda: shrink_adapter(odd, tmp_path / "same", energy=1.0, overwrite=True),
        lambda: merge_adapters([odd], tmp_path / "same", overwrite=True),
        lambda: merge_into_base([odd], base, tmp_path / "model", overwrite=True),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        told = [str(warning.message) for warning in caught if "which is left out: PEFT scales by" in str(warning)]
        assert bool(told) != agrees
    assert off(answer(base, tmp_path / "same"), wanted) <= 1e-5
    assert off(answers(opened(tmp_path / "model"), TOKENS), wanted) <= 1e-5


def with_a_grown_vocabulary(base: Path) -> Any:
    model = opened(base)
    model.resize_token_embeddings(70)
    return model


def test_copies_that_peft_saves_beside_grown_embeddings_are_left_out(base: Path, tmp_path: Path) -> None:
    model = with_a_grown_vocabulary(base)
    fields: Any = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    saved = saved_adapter(tmp_path / "lora", model, task_type="CAUSAL_LM", **fields)
    copies = {key for key in load_file(saved / TENSORS) if ".modules_to_save." in key or ".original_module." in key}
    assert len(copies) == 4
    inputs = {"input_ids": torch.tensor([[3, 69, 5, 64]])}
    wanted = answers(model, inputs)
    merged = opened(merge_into_base([saved], base, tmp_path / "model"))
    assert off(answers(merged, inputs), wanted) <= 1e-5

    shrink_adapter(saved, tmp_path / "same", energy=1.0)
    merge_adapters([saved, saved], tmp_path / "sum")
    rankwise.fix_adapter(saved, tmp_path / "mended")
    for name in ("same", "sum", "mended"):
        assert not copies & load_file(tmp_path / name / TENSORS).keys()
        peft_model = PeftModel.from_pretrained(with_a_grown_vocabulary(base), str(tmp_path / name))
        assert off(answers(peft_model, inputs), wanted) <= 1e-5

    other = rewritten(saved, tmp_path / "other", lambda t: {k: v + (".modules_to_save." in k) for k, v in t.items()})
    for call in (
        lambda: shrink_adapter(other, tmp_path / "out", rank=1),
        lambda: merge_into_base([other], base, tmp_path / "out"),
        lambda: rankwise.fix_adapter(other, tmp_path / "out"),
    ):
        with pytest.raises(AdapterFileError, match=r"holds one tensor under two names, '.*lm_head.weight' and '.*save"):
            call()


# --- dtypes -----------------------------------------------------------------------------------------------------------

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn}
KEPT = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.bfloat16, "float64": torch.float32}


def as_dtype(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: t.to(dtype) for key, t in tensors.items()}


def dtypes(folder: Path) -> set[torch.dtype]:
    return {t.dtype for t in load_file(folder / TENSORS).values()}


@pytest.mark.parametrize("name", [*NARROW, "float64"])
def test_a_dtype_is_kept_and_the_values_with_it(
    name: str, base: Path, plain: Path, other: Path, tmp_path: Path
) -> None:
    dtype = NARROW.get(name, torch.float64)
    narrow = rewritten(plain, tmp_path / "narrow", as_dtype(dtype))
    narrow_other = rewritten(other, tmp_path / "other", as_dtype(dtype))
    meant, added = (rewritten(at, tmp_path / at.name[:3], as_dtype(torch.float32)) for at in (narrow, narrow_other))
    save_file({k: t.to(dtype).float() for k, t in load_file(plain / TENSORS).items()}, meant / TENSORS)
    whole, whole_other = deltas(base, meant), deltas(base, added)
    eps = torch.finfo(KEPT[name]).eps + 1e-5

    printed = CliRunner().invoke(app, ["inspect", str(narrow)])
    assert printed.exception is None
    assert float(re.findall(r"update   ‖ΔW‖_F (\S+)", printed.output)[0]) == pytest.approx(norm(whole), rel=1e-3)
    assert rankwise.check_export(narrow, "peft", base=base).problems == []

    shrink_adapter(narrow, tmp_path / "same", energy=1.0)
    assert dtypes(tmp_path / "same") == {KEPT[name]}
    found = deltas(base, tmp_path / "same")
    assert norm({key: found[key] - W for key, W in whole.items()}) <= eps * norm(whole)

    report = merge_adapters([narrow, narrow_other], tmp_path / "sum", weights=[1, -0.5])
    assert dtypes(tmp_path / "sum") == {KEPT[name]}
    found, wanted = deltas(base, tmp_path / "sum"), {key: W - 0.5 * whole_other[key] for key, W in whole.items()}
    error = norm({key: found[key] - W for key, W in wanted.items()}) / norm(wanted)
    assert error <= eps
    assert report.relative_error == pytest.approx(error, abs=1e-4)

    taken = rankwise.import_lora(opened(base), narrow, rankwise.LoraConfig(r=4))
    assert off(answers(taken, TOKENS), answer(base, meant)) <= 1e-5


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_a_bfloat16_adapter_does_not_grow(layout: str, plain: Path, tmp_path: Path) -> None:
    narrow = rewritten(plain, tmp_path / "narrow", as_dtype(torch.bfloat16))
    shrink_adapter(narrow, tmp_path / "small", energy=0.99, layout=layout)
    merge_adapters([narrow, narrow], tmp_path / "sum", layout=layout)
    size = (narrow / TENSORS).stat().st_size
    assert (tmp_path / "small" / TENSORS).stat().st_size <= size
    assert (tmp_path / "sum" / TENSORS).stat().st_size <= size


def test_a_merge_is_as_wide_as_its_widest_adapter(plain: Path, other: Path, tmp_path: Path) -> None:
    one = rewritten(plain, tmp_path / "bfloat16", as_dtype(torch.bfloat16))
    two = rewritten(other, tmp_path / "float16", as_dtype(torch.float16))
    for folders, wanted in (([one, other], torch.float32), ([one, two], torch.float32), ([one, one], torch.bfloat16)):
        merge_adapters(folders, tmp_path / "sum", overwrite=True)
        assert dtypes(tmp_path / "sum") == {wanted}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_commands_write_the_dtype_that_is_asked_for(
    name: str, base: Path, plain: Path, other: Path, tmp_path: Path
) -> None:
    for command in (["shrink", str(plain), "--rank", "4"], ["merge", str(plain), str(other)]):
        out = tmp_path / command[0]
        done = CliRunner().invoke(app, [*command, "--dtype", name, "--out", str(out)])
        assert done.exception is None, done.exception
        assert dtypes(out) == {getattr(torch, name)}
    assert off(answer(base, tmp_path / "shrink"), answer(base, plain)) <= 10 * torch.finfo(getattr(torch, name)).eps


def test_dtypes_that_cannot_be_written_are_refused(plain: Path, tmp_path: Path) -> None:
    for name in ("int8", "float8_e4m3fn", "bf16"):
        with pytest.raises(ArgumentError, match="`dtype` must be one of"):
            shrink_adapter(plain, tmp_path / "out", rank=1, dtype=name)
        with pytest.raises(ArgumentError, match="`dtype` must be one of"):
            merge_adapters([plain], tmp_path / "out", dtype=name)
    large = rewritten(plain, tmp_path / "large", lambda tensors: {key: t * 1e5 for key, t in tensors.items()})
    with pytest.raises(RankwiseError, match=r"torch\.float16 cannot hold the update of module .* another dtype"):
        shrink_adapter(large, tmp_path / "out", rank=1, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_small_updates_keep_their_digits_in_float16(base: Path, plain: Path, tmp_path: Path) -> None:
    """Each factor takes its share of an update's size, since float16 loses digits below 6e-5."""
    small = rewritten(plain, tmp_path / "small", lambda tensors: {key: t * 1e-2 for key, t in tensors.items()})
    report = merge_adapters([small, small], tmp_path / "sum", dtype="float16")
    assert report.relative_error <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("choice", [["embed_tokens", "q_proj", "down_proj"], r".*\.(embed_tokens|q_proj|down_proj)"])
def test_the_choice_of_modules_stands_where_no_module_was_dropped(choice: Any, plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / CONFIG).read_text())
    given = rewritten(plain, tmp_path / "given", dict)
    (given / CONFIG).write_text(json.dumps(config | {"target_modules": choice}))
    for layout in ("compact", "uniform"):
        shrink_adapter(given, tmp_path / layout, budget=0.5, layout=layout)
        assert json.loads((tmp_path / layout / CONFIG).read_text())["target_modules"] == choice
