"""SoRA under TRL's DPOTrainer: the reference is the base model, which is what every rankwise adapter starts as.

python examples/dpo.py --steps 30          # a tiny Llama made on the spot; put your own model and data in
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import rankwise

PAIRS = {"prompt": ["the cat sat"] * 32, "chosen": [" on the mat"] * 32, "rejected": [" in the tree"] * 32}


def tiny_llama() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    words = sorted({word for texts in PAIRS.values() for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config), fast


def main(steps: int) -> None:
    model, tokenizer = tiny_llama()
    arguments = DPOConfig(
        tempfile.mkdtemp(), max_steps=steps, learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False
    )
    trainer = DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer,
        peft_config=rankwise.SoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    print(rankwise.status(trainer.model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
