"""vLLM on the CPU: all adapters in one engine."""

from __future__ import annotations

import sys

from common import PROMPTS, WORK, adapter, hand_over
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(names: list[str]) -> None:
    """Answers with each adapter. A refusal has to come from `add_lora`: within `generate` it hangs the engine."""
    llm = LLM(
        model=str(WORK / "llama"),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=1,
        max_model_len=256,
        max_num_batched_tokens=256,
        max_logprobs=512,
        enable_prefix_caching=False,
    )
    parameters = SamplingParams(max_tokens=1, logprobs=512, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    answers = {}
    for number, name in enumerate(names, 1):
        request = LoRARequest(name, number, str(adapter("llama", name)))
        try:
            llm.llm_engine.add_lora(request)
        except Exception as error:
            answers[name] = repr(error)
            continue
        outputs = llm.generate(prompts, parameters, lora_request=request, use_tqdm=False)
        given = [output.outputs[0].logprobs[0] for output in outputs]
        answers[name] = [[row[token].logprob for token in range(512)] for row in given]
    hand_over("vllm", answers)


if __name__ == "__main__":
    main(sys.argv[1:])
