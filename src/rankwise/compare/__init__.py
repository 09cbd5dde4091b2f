"""Fair comparison of methods: a SPEC, its plan, its runs, their results, a report.

Names are loaded when first used, so that a SPEC is read, and refused, before anything heavy is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.compare.plan import Plan, make_plan
    from rankwise.compare.results import Result, read_results
    from rankwise.compare.runner import run_plan
    from rankwise.compare.spec import Spec, read_spec
    from rankwise.compare.summary import summarise

__all__ = ["Plan", "Result", "Spec", "make_plan", "read_results", "read_spec", "run_plan", "summarise"]

_HOMES = {
    "Plan": "plan",
    "make_plan": "plan",
    "Result": "results",
    "read_results": "results",
    "summarise": "summary",
    "run_plan": "runner",
    "Spec": "spec",
    "read_spec": "spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise.compare' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rankwise.compare.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
