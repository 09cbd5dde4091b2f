"""The servers, one file each. Importing this package registers every file in it; nothing lists them by hand."""

from __future__ import annotations

import importlib
import pkgutil

from rankwise.export.servers.base import SERVERS, Problem, Rule, Server

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["SERVERS", "Problem", "Rule", "Server"]
