"""What one training step of every method launches, reads back and copies on the simulated device, exactly.

Counts do not depend on sizes, so the models are tiny. `bench/launches.py` prints and keeps them, and a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rankwise.adapters.configs import CONFIGS
from simulated import NAME, Counts, counted, register, so_far

RUN = 100_000
"""Steps of the run that the counted ones belong to, as schedules are told."""
WARM_UP = 3
"""Steps before the counted one: by then starts are found, and the optimiser has its state."""
R = 2
LAYERS = (2, 6, 24)
REFERENCE = "PEFT LoRA"

PHASES = ("forward", "backward", "rules", "optimizer")


# --- models ---------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}


def bert(layers: int) -> nn.Module:
    """An encoder with a classification head, without dropout."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**TINY, **no_dropout, num_hidden_layers=layers))


def llama(layers: int) -> nn.Module:
    """A decoder whose keys and values are narrower than its queries, as in larger models."""
    own: dict[str, Any] = {"num_key_value_heads": 1, "pad_token_id": 0, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**TINY, **own, num_hidden_layers=layers))


MODELS: dict[str, tuple[Callable[[int], nn.Module], str]] = {"bert": (bert, "SEQ_CLS"), "llama": (llama, "CAUSAL_LM")}
"""How a model of so many layers is made, and PEFT's name of its task."""


def batch_of(model: str) -> dict[str, torch.Tensor]:
    """A batch on the device."""
    tokens = torch.arange(1, 13).view(2, 6)
    labels = tokens if model == "llama" else torch.tensor([0, 1])
    return {"input_ids": tokens.to(NAME), "labels": labels.to(NAME)}


# --- ways of training -----------------------------------------------------------------------------------------------

FALLING = {"total_step": RUN, "tinit": 1, "tfinal": 1}
"""Ranks may fall from the second step to the last but one."""
FIELDS: dict[str, dict[str, Any]] = {
    "adalora": FALLING | {"init_r": R, "target_r": 1},
    "salora": FALLING | {"r": R},
    "alora": {"r": R, "rounds": 0},
}
"""Of methods that must be told how long a run is. ALoRA's rounds, and all but one kind of AdaLoRA's steps, allocate
nothing: the counted step is one of the many between two allocations."""


def configs(task: str) -> dict[str, Any]:
    """A fresh config for each way of training, by the name of its row."""
    shared: dict[str, Any] = {"target_modules": "all-linear", "task_type": task}
    found: dict[str, Any] = {
        REFERENCE: peft.LoraConfig(r=R, lora_alpha=R, **shared),
        "PEFT AdaLoRA": peft.AdaLoraConfig(**FALLING, init_r=R, target_r=1, **shared),
    }
    for name, config in CONFIGS.items():
        found[name] = config(**FIELDS.get(name, {"r": R}), **shared)
    found["adalora, allocating"] = CONFIGS["adalora"](**FIELDS["adalora"], deltaT=1, **shared)
    return found


WAYS = tuple(configs("SEQ_CLS"))


@dataclass
class StepCounts:
    """The counts of one step, by phase."""

    forward: Counts
    backward: Counts
    rules: Counts
    """The hooks around the optimiser's move; of PEFT's AdaLoRA, the call that its documentation asks for."""
    optimizer: Counts
    """AdamW's own move."""

    @property
    def numbers(self) -> dict[str, int]:
        """What a result file keeps."""
        phases = {phase: getattr(self, phase) for phase in PHASES}
        launches = {phase: counts.launches for phase, counts in phases.items()}
        reads = sum(counts.reads for counts in phases.values())
        copies = sum(counts.copies for counts in phases.values())
        return launches | {"reads": reads, "copies": copies}


class Training:
    """A model in training on the simulated device.

    Args:
        model: a name in `MODELS`.
        way: a name in `WAYS`.
        layers: of the model.
    """

    def __init__(self, model: str, way: str, layers: int) -> None:
        register()
        make, task = MODELS[model]
        torch.manual_seed(0)
        self.model: Any = get_peft_model(make(layers), configs(task)[way]).to(NAME).train()
        self.batch = batch_of(model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # Trainer's default.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
        # Hooks of an optimiser itself run after the rules' first half, and before the second.
        self._marks: list[Counts] = []
        self.optimizer.register_step_pre_hook(self._mark)
        self.optimizer.register_step_post_hook(self._mark)
        self._allocates = self.model.base_model.update_and_allocate if way == "PEFT AdaLoRA" else None
        self._taken = 0

    def step(self) -> StepCounts:
        """One training step and what it cost."""
        self._marks = [so_far()]
        loss = self.model(**self.batch).loss
        self._mark()
        loss.backward()
        self._mark()
        self.optimizer.step()
        self._taken += 1
        if self._allocates is not None:
            self._allocates(self._taken)
        self._mark()
        self.optimizer.zero_grad()
        start, forward, backward, before_move, after_move, end = self._marks
        return StepCounts(
            forward=forward - start,
            backward=backward - forward,
            rules=(before_move - backward) + (end - after_move),
            optimizer=after_move - before_move,
        )

    def _mark(self, *_: Any) -> None:
        self._marks.append(so_far())


def counts_of(model: str, way: str, layers: int) -> dict[str, int]:
    """The counts of a step in the midst of a run, and what the run's first step reads and copies."""
    training = Training(model, way, layers)
    first = training.step().numbers
    for _ in range(WARM_UP - 1):
        training.step()
    numbers = training.step().numbers
    return numbers | {"first reads": first["reads"], "first copies": first["copies"]}


def places_of(model: str, way: str, layers: int, *, first: bool = False) -> dict[str, int]:
    """Where the reads and copies of such a step come from, or those of the first step."""
    training = Training(model, way, layers)
    for _ in range(0 if first else WARM_UP):
        training.step()
    with counted(places=True) as counts:
        training.step()
    return dict(counts.places)


# --- as a table -----------------------------------------------------------------------------------------------------


def row(numbers: Mapping[str, int], reference: Mapping[str, int]) -> str:
    """The counts of one way, and the launches of its passes over those of PEFT's LoRA."""
    passes = numbers["forward"] + numbers["backward"]
    ratio = passes / (reference["forward"] + reference["backward"])
    told = [str(numbers[key]) for key in ("forward", "backward", "rules")]
    first = f"{numbers['first reads']}, {numbers['first copies']}"
    return " | ".join([*told, f"{ratio:.2f}", str(numbers["reads"]), str(numbers["copies"]), first])


def table(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """One model's counts by way and by number of layers, as the documentation shows them."""
    lines = [
        "| | layers | forward | backward | rules | × PEFT LoRA | reads | copies | first step: reads, copies |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, by_layers in counts.items():
        for layers, numbers in by_layers.items():
            name = way if layers == next(iter(by_layers)) else ""
            lines.append(f"| {name} | {layers} | {row(numbers, counts[REFERENCE][layers])} |")
    return "\n".join(lines)
