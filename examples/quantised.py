"""NB-LoRA on a four-bit base with an optimiser of eight bits (bitsandbytes), exported as a plain LoRA.

python examples/quantised.py --steps 60
"""

from __future__ import annotations

import argparse
import tempfile

import bitsandbytes
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
)

import rankwise


def main(steps: int) -> None:
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()  # a tiny BERT made on the spot; put your own model in
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=3, **sizes)).save_pretrained(folder)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )
    base = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=four_bits)
    config = rankwise.NbLoraConfig(r=4, bound=10.0, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=5e-3)

    for _ in range(steps):
        labels = torch.randint(0, 3, (16,))
        tokens = torch.randint(0, 30, (16, 10)) + 30 * labels[:, None]
        loss = model(input_ids=tokens.to(base.device), labels=labels.to(base.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    exported = rankwise.export_lora(model, tempfile.mkdtemp() + "/lora")
    print(f"loss {loss.item():.2f}", f"export within {exported.relative_error:.0e}", rankwise.status(model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
