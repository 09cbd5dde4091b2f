"""The methods, one file each. Importing this package registers every file in it; nothing lists them by hand."""

from __future__ import annotations

import importlib
import pkgutil

from rankwise.methods.base import METHODS, Method

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["METHODS", "Method"]
