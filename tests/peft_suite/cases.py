"""The case tables of PEFT's suite, with rankwise's config classes in place of PEFT's own.

A copy of this file lies beside PEFT's `test_custom_models.py` while the suite runs, and PEFT's tables are replaced by
the ones here. The rows have the columns of PEFT's rows.
"""

from __future__ import annotations

from typing import Any

import rankwise
from rankwise.adapters.configs import CONFIGS

Kwargs = dict[str, Any]

CLASSES: tuple[type, ...] = tuple(CONFIGS.values())
"""Every config class; the order of the printed counts."""


def level(model: Any) -> float:
    """A score for rounds of ALoRA that holds no preference: ties are broken by order."""
    return 0.0


ALWAYS: dict[type, Kwargs] = {
    rankwise.AdaLoraConfig: {"total_step": 1000},
    rankwise.AloraConfig: {"rounds": 0},
    rankwise.SaloraConfig: {"total_step": 10, "tinit": 0, "tfinal": 0.5, "gate_lr": 0.1, "multiplier_lr": 200.0},
    rankwise.DeepLoraConfig: {"init_scale": 0.01},
}
"""What a class must be told in a loop without a trainer."""

SHAPES: tuple[tuple[str, str, Kwargs], ...] = (
    ("MLP string", "MLP", {"target_modules": "lin0"}),
    ("MLP first", "MLP", {"target_modules": ["lin0"]}),
    ("MLP last", "MLP", {"target_modules": ["lin1"]}),
    ("MLP both", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP pattern", "MLP", {"target_modules": r"lin[01]"}),
    ("MLP exclude", "MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
    ("MLP modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP dropout", "MLP", {"target_modules": ["lin0"], "lora_dropout": 0.1}),
    ("MLP r 1", "MLP", {"target_modules": ["lin0"], "r": 1}),
    ("MLP rank_pattern", "MLP", {"target_modules": ["lin0", "lin1"], "r": 4, "rank_pattern": {"lin1": 1}}),
    ("MLP2 first", "MLP2", {"target_modules": ["lin0"], "r": 4}),
    ("MLP_LayerNorm both", "MLP_LayerNorm", {"target_modules": ["lin0", "lin1"], "r": 4}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv1D r 1", "EmbConv1D", {"target_modules": ["conv1d"], "r": 1}),
    ("Conv1D and linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    ("Conv1D modules_to_save", "EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]}),
)
"""Rows for every class: case, PEFT's name of the model, kwargs. "Conv1D" is the one of transformers."""

SCALED: tuple[tuple[str, str, Kwargs], ...] = (
    ("MLP alpha", "MLP", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    ("MLP rslora", "MLP", {"target_modules": ["lin0", "lin1"], "r": 4, "lora_alpha": 8, "use_rslora": True}),
    (
        "MLP alpha_pattern",
        "MLP",
        {"target_modules": ["lin0", "lin1"], "r": 2, "lora_alpha": 2, "alpha_pattern": {"lin1": 4}},
    ),
)
"""Rows for the classes that have a lora_alpha / r scale."""

LORA_FORM: tuple[tuple[str, str, Kwargs], ...] = (
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d and linear", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d 1x1", "Conv2d1x1", {"target_modules": ["conv2d"]}),
    ("Conv2d dropout", "Conv2d2", {"target_modules": ["conv2d"], "lora_dropout": 0.1}),
    ("Embedding", "EmbConv1D", {"target_modules": ["emb"]}),
    ("Embedding and Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
)
"""Rows for the classes that take other layers than linear ones."""

OWN: dict[type, tuple[tuple[str, str, Kwargs], ...]] = {
    rankwise.NnmLoraConfig: (
        ("MLP norm held", "MLP", {"target_modules": ["lin0"], "frobenius": "held"}),
        ("MLP no norm", "MLP", {"target_modules": ["lin0"], "frobenius": "none", "nuclear_weight": 1.0}),
        ("MLP no penalty", "MLP", {"target_modules": ["lin0", "lin1"], "nuclear_weight": 0.0}),
    ),
    rankwise.SoraConfig: (
        ("MLP open gates", "MLP", {"target_modules": ["lin0"], "gate_init": "ones", "sparse_weight": 0.0}),
        ("MLP gate_lr", "MLP", {"target_modules": ["lin0"], "gate_lr": 0.1, "sparse_penalty": 1.0}),
    ),
    rankwise.AdaLoraConfig: (
        ("MLP sensitivity", "MLP", {"target_modules": ["lin0"], "importance": "sensitivity", "init_r": 8, "r": 4}),
        ("MLP magnitude", "MLP", {"target_modules": ["lin0", "lin1"], "importance": "magnitude"}),
        ("MLP sum", "MLP", {"target_modules": ["lin0"], "orth_reg_form": "sum"}),
    ),
    rankwise.SorsaConfig: (
        ("MLP full", "MLP", {"target_modules": ["lin0"], "svd": "full"}),
        ("MLP sum", "MLP", {"target_modules": ["lin0"], "orth_reg_form": "sum", "r": 4}),
        ("MLP no penalty", "MLP", {"target_modules": ["lin0"], "orth_reg_weight": 0.0}),
        ("MLP cached", "MLP", {"target_modules": ["lin0", "lin1"], "residual": "cached"}),
    ),
    rankwise.AloraConfig: (
        ("MLP capacity", "MLP", {"target_modules": ["lin0", "lin1"], "r": 2, "max_r": 5}),
        (
            "MLP rounds",
            "MLP",
            {"target_modules": ["lin0"], "rounds": 1, "warmup_steps": 2, "recovery_steps": 1, "score_batch": level},
        ),
    ),
    rankwise.SaloraConfig: (
        ("MLP sum", "MLP", {"target_modules": ["lin0"], "orth_reg_form": "sum"}),
        ("MLP dense", "MLP", {"target_modules": ["lin0", "lin1"], "density": 0.9, "gate_lr": 0.05}),
    ),
    rankwise.NbLoraConfig: (
        ("MLP frobenius", "MLP", {"target_modules": ["lin0"], "norm": "frobenius", "r": 4}),
        ("MLP nuclear even", "MLP", {"target_modules": ["lin0", "lin1"], "norm": "nuclear", "learn_split": False}),
        ("MLP absolute", "MLP", {"target_modules": ["lin0"], "bound": 2.0, "bound_relative_to_weight": False}),
        ("MLP vector", "MLP", {"target_modules": ["lin0"], "r": 3, "singular_value_bounds": [1.0, 0.5, 0.25]}),
        ("MLP svd", "MLP", {"target_modules": ["lin0", "lin1"], "parameterization": "svd", "norm": 3.0}),
    ),
    rankwise.DeepLoraConfig: (
        ("MLP depth 2", "MLP", {"target_modules": ["lin0"], "depth": 2}),
        ("MLP faster subspace", "MLP", {"target_modules": ["lin0", "lin1"], "outer_lr_ratio": 1.0}),
    ),
}
"""Rows for hyper-parameters of one method."""

LOUDER: dict[tuple[type, str], Kwargs] = (
    {
        # The default threshold closes all gates of these cases within three steps at the suite's rate.
        (rankwise.SoraConfig, "Conv1D"): {"sparse_weight": 0.375},
        (rankwise.SoraConfig, "Conv1D r 1"): {"sparse_weight": 0.375},
        (rankwise.SoraConfig, "Conv1D and linear"): {"lora_alpha": 64, "sparse_weight": 0.375},
        (rankwise.AdaLoraConfig, "Conv1D and linear"): {"lora_alpha": 64},
        (rankwise.AdaLoraConfig, "MLP_LayerNorm both"): {"lora_alpha": 256},
        (rankwise.SaloraConfig, "Conv2d 1x1"): {"density": 0.9},  # one rank, which a density of 0.5 closes
    }
    | {
        (config, case): {"lora_alpha": 256}
        for config in (rankwise.LoraConfig, rankwise.SoraConfig, rankwise.AloraConfig)
        for case in ("Embedding", "Embedding and Conv1D")
    }
    | {
        (config, case): louder
        for config, louder in (
            (rankwise.NbLoraConfig, {"bound": 10.0}),
            (rankwise.DeepLoraConfig, {"init_scale": 0.05}),
        )
        for case in ("MLP_LayerNorm both", "Conv1D", "Conv1D r 1", "Conv1D and linear", "Conv1D modules_to_save")
    }
)
"""A larger scale where the suite's three steps at its fixed rates move a tensor by less than its tolerance of 1e-4.

AdaLoRA starts from Λ = 0 and entries of P and Q near 0.02, SoRA from B = 0 and gates that close as it trains: with the
small inputs of these models the first moves are of the order of 1e-5. The A of an embedding is as small as that of a
linear layer of as many inputs, and an id sees one column of it: without a penalty, its gradient is of that order too.
"""

PAIRS: tuple[tuple[str, str, Kwargs, Kwargs], ...] = (
    ("same", "rankwise", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("different", "rankwise", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    ("overlapping", "rankwise", {"target_modules": ["lin0", "lin1"]}, {"target_modules": ["lin1"]}),
    ("other rank", "rankwise", {"target_modules": ["lin0"], "r": 2}, {"target_modules": ["lin0"], "r": 4}),
    ("same, bias-free", "ia3", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("different, bias-free", "ia3", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
)
"""Two adapters of one class: case, PEFT's key of the model (its MLP has no biases under "ia3"), kwargs of each."""


def _label(config: type) -> str:
    """The class as it stands in a case's name."""
    return f"rankwise {config.__name__.removesuffix('Config')}"


def _rows(config: Any) -> tuple[tuple[str, str, Kwargs], ...]:
    """Rows (case, model, kwargs) of one class."""
    others = () if getattr(config, "linear_only", False) else LORA_FORM
    return (*SHAPES, *others, *(SCALED if config.scaled else ()), *OWN.get(config, ()))


def _cases() -> list[tuple[str, str, type, Kwargs]]:
    """Rows (name, model, class, kwargs)."""
    return [
        (f"{_label(config)} {case}", model, config, ALWAYS.get(config, {}) | kwargs | LOUDER.get((config, case), {}))
        for config in CLASSES
        for case, model, kwargs in _rows(config)
    ]


def _pairs() -> list[tuple[str, str, type, Kwargs, Kwargs]]:
    """Rows (name, model, class, kwargs of the first adapter, kwargs of the second)."""
    return [
        (f"{_label(config)} {case}", model, config, *(ALWAYS.get(config, {}) | one | start for one in (first, second)))
        for config in CLASSES
        for case, model, first, second in PAIRS
        for start in ({"init_weights": False},)
    ]


TABLES: dict[str, list[Any]] = {
    "TEST_CASES": _cases(),
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": _pairs(),
}
"""PEFT's module-level tables that are replaced, by name."""

NAMED = [config(target_modules=["lin0"], init_weights=False, **ALWAYS.get(config, {})) for config in CLASSES]
"""One config of each class."""

DECORATORS: dict[str, tuple[str, str]] = {
    "test_adapter_name_makes_no_difference": ("config0", "NAMED"),
    "test_multiple_adapters_mixed_modules_to_save": ("config_cls", "CLASSES"),
    "test_multiple_adapters_mixed_modules_to_save_order_switched": ("config_cls", "CLASSES"),
    "test_default_target_modules_not_set_raises": ("config_cls", "CLASSES"),
    "test_default_target_modules_not_set_model_type_set_raises": ("config_cls", "CLASSES"),
    "test_default_target_modules_list_of_str": ("config_cls", "CLASSES"),
    "test_default_target_modules_str": ("config_cls", "CLASSES"),
}
"""PEFT's tables that stand in a test's decorator: test → (argument, the name here that replaces the list)."""

DERIVED = {"ALL_PEFT_CONFIG_CLASSES": "TEST_CASES"}
"""Tables that PEFT computes from a replaced one, and that therefore need no replacement."""

LEFT_OUT: dict[tuple[str, str], str] = {}
"""(test, case) → why it does not run. Everything else in the tables runs."""
