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
    from rankwise import compare as compare
    from rankwise import completion as completion
    from rankwise import errors as errors
    from rankwise import spectral as spectral
    from rankwise.adapters.configs import *  # noqa: F403  every config class, without naming them here
    from rankwise.adapters.lookup import factors, ranks
    from rankwise.export.check import check_export
    from rankwise.export.fix import fix_adapter
    from rankwise.export.importing import import_lora
    from rankwise.export.lora import export_lora
    from rankwise.export.merge import merge_adapters
    from rankwise.export.shrink import shrink_adapter
    from rankwise.training.lightning_spectra import LightningSpectra
    from rankwise.training.loraplus import loraplus_groups
    from rankwise.training.recording import Recorder
    from rankwise.training.spectra import SpectraCallback
    from rankwise.training.status import Status, finalize, status
    from rankwise.update import Factors

__version__ = "0.1.0"

_MODULES = ("compare", "completion", "errors", "spectral")
"""Public modules, imported when first used."""

_HOMES = {
    "Factors": "rankwise.update",
    "LightningSpectra": "rankwise.training.lightning_spectra",
    "Recorder": "rankwise.training.recording",
    "SpectraCallback": "rankwise.training.spectra",
    "Status": "rankwise.training.status",
    "check_export": "rankwise.export.check",
    "export_lora": "rankwise.export.lora",
    "factors": "rankwise.adapters.lookup",
    "finalize": "rankwise.training.status",
    "fix_adapter": "rankwise.export.fix",
    "import_lora": "rankwise.export.importing",
    "loraplus_groups": "rankwise.training.loraplus",
    "merge_adapters": "rankwise.export.merge",
    "ranks": "rankwise.adapters.lookup",
    "shrink_adapter": "rankwise.export.shrink",
    "status": "rankwise.training.status",
}
__all__ = [
    "Factors",
    "LightningSpectra",
    "Recorder",
    "SpectraCallback",
    "Status",
    "check_export",
    "export_lora",
    "factors",
    "finalize",
    "fix_adapter",
    "import_lora",
    "loraplus_groups",
    "merge_adapters",
    "ranks",
    "shrink_adapter",
    "status",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"rankwise.{name}")
    if name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
    elif name.endswith("Config"):
        found = _configs().get(name)
    else:
        found = None
    if found is None:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", *_MODULES, *_configs()])


def _configs() -> dict[str, Any]:
    known = importlib.import_module("rankwise.adapters.configs").CONFIGS
    return {config.__name__: config for config in known.values()}


def _when_peft_is_imported(_: object) -> None:
    importlib.import_module("rankwise.adapters.register").register()
    importlib.import_module("rankwise.training.hooks").install()
    importlib.import_module("rankwise.training.first_step").install()


def _when_the_trainer_is_imported(_: object) -> None:
    importlib.import_module("rankwise.training.trainers").install()


wrapt.register_post_import_hook(_when_peft_is_imported, "peft")
wrapt.register_post_import_hook(_when_the_trainer_is_imported, "transformers.trainer")
