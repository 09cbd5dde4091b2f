"""Small commands on a plain LoRA import neither PEFT nor transformers, which take longer than all else they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file

from rankwise.adapters.configs import CONFIGS
from rankwise.export.lora_config import is_target
from rankwise.methods.catalogue import catalogue

HEAVY = ("peft", "transformers", "accelerate")
RUN = """
import json, sys
from rankwise.cli.main import main
try:
    main()
finally:
    print(json.dumps(sorted({"peft", "transformers", "accelerate"} & sys.modules.keys())))
"""


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """As PEFT saves one, on a base model that is on no machine here."""
    folder = tmp_path / "lora"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="nobody/has-this-model")
    config.save_pretrained(str(folder))
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A.weight": torch.randn(2, 6), f"{name}.lora_B.weight": torch.randn(5, 2)}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["methods", "--json"],
        ["inspect", "lora"],
        ["shrink", "lora", "--rank", "1", "--out", "small"],
        ["merge", "lora", "lora", "--out", "merged"],
        ["check-export", "lora", "--for", "vllm,llama.cpp,sglang,peft"],
    ],
    ids=lambda command: command[0],
)
def test_a_small_command_starts_without_peft_and_transformers(command: list[str], lora: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command],
        cwd=lora.parent,
        capture_output=True,
        text=True,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path), "HOME": str(lora.parent)},
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr
    assert done.returncode in (0, 1), done.stderr


def test_the_catalogue_is_what_the_config_classes_say() -> None:
    for method in catalogue():
        config = CONFIGS[method["method"]]
        assert method["config"] == config.__name__
        made = config()
        for name, field in method["fields"].items():
            default = getattr(made, name)
            assert field["default"] == (list(default) if isinstance(default, tuple) else default)
    assert {method["method"] for method in catalogue()} == set(CONFIGS)


NAMES = ["q_proj", "layers.0.q_proj", "model.layers.1.mlp.experts.2.up", "layers.12.proj", "lm_head", "a.q_proj", "q"]
ENDS = st.lists(st.sampled_from(["q_proj", "up", "proj", "lm_head", "mlp", "layers.0.q_proj", "q"]), max_size=3)


@settings(max_examples=300, deadline=None)
@given(
    targets=st.one_of(ENDS, st.sampled_from([r".*q_proj", r"layers\.\d+\..*", "all-linear", "q_proj"])),
    excluded=st.one_of(st.none(), ENDS, st.just(r".*\.0\..*")),
    in_full=st.one_of(st.none(), ENDS),
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 12), max_size=2)),
    pattern=st.one_of(st.none(), st.sampled_from(["layers", "experts", ["layers", "blocks"], []])),
)
def test_modules_are_chosen_as_peft_chooses_them(
    targets: object, excluded: object, in_full: object, layers: object, pattern: object
) -> None:
    if isinstance(targets, str) or layers is None:
        layers, pattern = None, None  # refused by PEFT
    config = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "modules_to_save": in_full,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    of_peft = peft.LoraConfig(**config)  # type: ignore[arg-type]
    for name in NAMES:
        assert is_target(config, name) == bool(check_target_module_exists(of_peft, name)), (config, name)
