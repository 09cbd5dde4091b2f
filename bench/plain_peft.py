"""Plain PEFT LoRA with Trainer on a SPEC's data and settings, without rankwise's layer, configs or rules.

    python bench/plain_peft.py spec.toml

The accuracy that `rankwise compare spec.toml` reports for `lora` is to be held against this one.
"""

from __future__ import annotations

import sys
import tempfile

import numpy as np
import peft
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from rankwise.base_models import locate
from rankwise.compare.data import load_splits
from rankwise.compare.spec import read_spec
from rankwise.compare.tasks import Examples
from rankwise.compare.tasks.classification import Classification
from rankwise.methods import METHODS


def main(path: str) -> None:
    spec = read_spec(path)
    splits = load_splits(spec.data, spec.task)
    tokenizer = AutoTokenizer.from_pretrained(locate(spec.model))

    task = spec.task
    assert isinstance(task, Classification)

    def tokenized(examples: Examples) -> Dataset:
        tokens = tokenizer(examples["text"], truncation=True, max_length=task.max_length)
        return Dataset.from_dict({**tokens, "labels": task.targets(examples, splits)})

    assert spec.training.steps is not None
    for seed in spec.seeds:
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            locate(spec.model), num_labels=len(splits.labels or [0])
        )
        r = spec.budget.r
        rate = spec.training.learning_rate or METHODS["lora"].suggested_rate
        config = peft.LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="SEQ_CLS")
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=spec.training.steps,
            per_device_train_batch_size=spec.training.batch_size,
            learning_rate=rate,
            warmup_steps=round(spec.training.warmup * spec.training.steps),
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        adapted = peft.get_peft_model(model, config)
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        head = [p for name, p in trained.items() if "modules_to_save" in name]
        adapter = [p for name, p in trained.items() if "modules_to_save" not in name]
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        groups = [
            {"params": adapter, "lr": rate, "weight_decay": 0.0},
            {"params": head, "lr": spec.training.head_learning_rate, "weight_decay": 0.0},
        ]
        trainer = Trainer(
            model=adapted,
            args=arguments,
            optimizers=(kind(groups, **options), None),
            train_dataset=tokenized(splits.train),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        guesses = np.argmax(trainer.predict(tokenized(splits.test)).predictions, -1)
        accuracy = np.mean(guesses == np.asarray(task.targets(splits.test, splits)))
        print(f"plain PEFT LoRA, seed {seed}: accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
