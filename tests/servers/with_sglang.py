"""SGLang: its adapter reader and memory pool, the rest of it stubbed, since it has no CPU server.

What the pool then holds for each layer is added to the model's weights: (B·A)·scaling, as its kernels compute it.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from common import CACHE, WORK, adapter, hand_over, next_token
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

SOURCE = CACHE / "stock" / "source"
REAL = (
    "sglang.srt.lora.lora",
    "sglang.srt.lora.lora_config",
    "sglang.srt.lora.utils",
    "sglang.srt.lora.mem_pool",
    "sglang.srt.lora.eviction_policy",
    "sglang.srt.layers.utils",
    "sglang.srt.layers.utils.common",
)
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MODULES = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
RANK = 8
ONE_PROCESS = SimpleNamespace(
    tp_size=1, tp_rank=0, attn_tp_size=1, moe_ep_size=1, moe_ep_rank=0, moe_tp_size=1, moe_tp_rank=0
)
GIVEN: dict[str, dict[str, Any]] = {
    "sglang.srt.runtime_context": {"get_parallel": lambda: ONE_PROCESS},
    "sglang.srt.utils": {"is_pin_memory_available": lambda: False},
    "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_EXPERIMENTAL_LORA_OPTI=SimpleNamespace(get=lambda: False))},
    "sglang.srt.lora.layers": {"unwrap_lora_layer": lambda layer: layer},
}
"""What the modules under test do read of the others."""


class Absent:
    """A class of SGLang that no object here is of."""


class Stub(ModuleType):
    """A module of SGLang that is not needed: whatever is asked of it is there."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent if name[0].isupper() else MagicMock()


class Finder:
    """Stubs all of SGLang but the modules under test."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "sglang":
            return None
        if name in REAL:
            return importlib.machinery.PathFinder.find_spec(name, [str((SOURCE / name.replace(".", "/")).parent)])
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(GIVEN.get(module.__name__, {}))


def placed(name: str, model: LlamaForCausalLM) -> tuple[Any, Any]:
    """The pool with one adapter in its first slot, and the adapter."""
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.mem_pool import LoRAMemoryPool

    folder = adapter("llama", name)
    config = LoRAConfig(str(folder))
    lora = LoRAAdapter(name, config, model.config, None, None)
    lora.initialize_weights_from_tensors(load_file(folder / "adapter_model.safetensors"))
    pool = LoRAMemoryPool(model.config, 1, torch.float32, RANK, MODULES, model, "lru", 0, strict_loading=True)
    assert pool.can_support(config)
    same = SimpleNamespace(slice_lora_a_weights=lambda A: A, slice_lora_b_weights=lambda B: B)
    layers = [{f"model.layers.{i}.{module}": same for module in MODULES} for i in range(model.config.num_hidden_layers)]
    pool.load_lora_weight_to_buffer(name, 0, lora, layers, None, None)
    return pool, lora


@torch.no_grad()
def add(pool: Any, lora: Any, model: LlamaForCausalLM) -> None:
    """Add the pool's updates to the model: slices of a stacked module lie `r` rows apart in A, as wide as W in B."""
    rank = lora.config.r
    for index, layer in enumerate(model.model.layers):
        linears = {name.rpartition(".")[2]: linear for name, linear in layer.named_modules()}
        for module in MODULES:
            A, B = pool.A_buffer[module][index][0], pool.B_buffer[module][index][0]
            top = 0
            for k, part in enumerate(STACKED.get(module, (module,))):
                weight = linears[part].weight
                rows = slice(top, top := top + weight.shape[0])
                weight += lora.scaling * B[rows, :rank] @ A[k * rank : (k + 1) * rank]


@torch.no_grad()
def main(names: list[str]) -> None:
    """Answers with each adapter, or SGLang's refusal."""
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
    answers: dict[str, Any] = {}
    for name in names:
        model = LlamaForCausalLM.from_pretrained(WORK / "llama").eval()
        try:
            pool, lora = placed(name, model)
        except Exception as error:
            answers[name] = repr(error)
            continue
        add(pool, lora, model)
        answers[name] = next_token(model).tolist()
    hand_over("sglang", answers)


if __name__ == "__main__":
    main(sys.argv[1:])
