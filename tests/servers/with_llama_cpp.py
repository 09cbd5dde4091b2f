"""llama.cpp: its converters and its server, a process per adapter, since it aborts on what it does not take."""

from __future__ import annotations

import math
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import transformers  # noqa: F401  here once, and not in every process
from common import CACHE, PROMPTS, WORK, adapter, hand_over, received

SOURCE = next(CACHE.glob("stock/source/*/vendor/llama.cpp"))
BASE = WORK / "llama.gguf"
sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]


def convert(script: str, *options: str | Path) -> None:
    """Run one of llama.cpp's converters, at float32."""
    sys.argv = [script, "--outtype", "f32", *map(str, options)]
    runpy.run_path(str(SOURCE / script), run_name="__main__")


def answer(name: str) -> None:
    """Convert an adapter, load it, and leave the log-probabilities of the next token."""
    import xllamacpp

    lora = WORK / "lora.gguf"
    convert("convert_lora_to_gguf.py", "--base", WORK / "llama", "--outfile", lora, adapter("llama", name))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(BASE)
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.n_ctx, parameters.warmup, parameters.fit_params = 256, False, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    rows = []  # of log-probabilities before the bias, which picks a whole character: others come without any
    for ids in PROMPTS:
        asked = {"prompt": ids, "max_tokens": 1, "logprobs": 512, "logit_bias": [[400, 100.0]], "cache_prompt": False}
        given = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        row = [-math.inf] * 512
        for token in given:
            row[token["id"]] = token["logprob"]
        rows.append(row)
    hand_over("llama.cpp-one", {name: rows})
    os._exit(0)


def main(names: list[str]) -> None:
    """Answers with each adapter."""
    convert("convert_hf_to_gguf.py", "--outfile", BASE, WORK / "llama")
    answers = {}
    for name in names:
        process = multiprocessing.get_context("fork").Process(target=answer, args=(name,))
        process.start()
        process.join()
        answers[name] = f"ended with {process.exitcode}" if process.exitcode else received("llama.cpp-one")[name]
    hand_over("llama.cpp", answers)


if __name__ == "__main__":
    main(sys.argv[1:])
