"""LoRA, the baseline: ΔW = (lora_alpha / r)·B A, with A random and B zero at the start.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rankwise.methods.base import Method, register


@register
@dataclass
class Lora(Method):
    """Low-rank adaptation of fixed rank."""

    method: ClassVar[str] = "lora"
    config_name: ClassVar[str] = "LoraConfig"
    summary: ClassVar[str] = "fixed rank; the baseline"
    suggested_rate: ClassVar[float] = 1e-3
