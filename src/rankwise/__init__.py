"""Low-rank fine-tuning that chooses its own ranks.

Importing rankwise is light: it loads neither torch, PEFT nor transformers. Names are loaded when first used, and the
methods register with PEFT whenever PEFT is imported, before or after.

>>> import rankwise
>>> rankwise.SoraConfig(r=16, target_modules="all-linear").method
'sora'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from rankwise.adapters.configs import *  # noqa: F403  every config class, without naming them here
    from rankwise.adapters.lookup import factors, ranks
    from rankwise.export.lora import export_lora
    from rankwise.training.status import Status, finalize, status
    from rankwise.update import Factors

__version__ = "0.1.0"

_HOMES = {
    "Factors": "rankwise.update",
    "Status": "rankwise.training.status",
    "export_lora": "rankwise.export.lora",
    "factors": "rankwise.adapters.lookup",
    "finalize": "rankwise.training.status",
    "ranks": "rankwise.adapters.lookup",
    "status": "rankwise.training.status",
}
__all__ = ["Factors", "Status", "export_lora", "factors", "finalize", "ranks", "status"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name) or ("rankwise.adapters.configs" if name.endswith("Config") else None)
    if home is None or not hasattr(module := importlib.import_module(home), name):
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    configs = importlib.import_module("rankwise.adapters.configs").CONFIGS.values()
    return sorted([*__all__, "__version__", *(config.__name__ for config in configs)])


def _when_peft_is_imported(_: object) -> None:
    importlib.import_module("rankwise.adapters.register").register()
    importlib.import_module("rankwise.training.hooks").install()


def _when_the_trainer_is_imported(_: object) -> None:
    importlib.import_module("rankwise.training.trainers").install()


wrapt.register_post_import_hook(_when_peft_is_imported, "peft")
wrapt.register_post_import_hook(_when_the_trainer_is_imported, "transformers.trainer")
