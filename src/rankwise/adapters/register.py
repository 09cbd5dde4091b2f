"""The only file that writes PEFT's registries. Runs once, whenever PEFT is imported; running it again changes nothing.

PEFT's own `register_peft_method` takes members of a closed enum only. Its three registries are plain dicts, which is
all that `get_peft_model`, saving and loading read.
"""

from __future__ import annotations

from rankwise.adapters.configs import CONFIGS, peft_type
from rankwise.adapters.tuner import PREFIX, RankwiseTuner


def register() -> None:
    """Make PEFT know every config class.

    Raises:
        ImportError: PEFT's registries are not where they were.
    """
    import peft.mapping as mapping  # noqa: PLC0415  imported here so that a PEFT without it meets the sentence below

    names = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
    registries = [getattr(mapping, name, None) for name in names]
    if not all(isinstance(registry, dict) for registry in registries):
        raise ImportError(
            f"this version of peft keeps its methods elsewhere than peft.mapping.{names[0]}; rankwise needs peft 0.21"
        )
    to_config, to_tuner, to_prefix = registries
    for config in CONFIGS.values():
        key = peft_type(config)
        to_config[key], to_tuner[key], to_prefix[key] = config, RankwiseTuner, PREFIX  # type: ignore[index]
