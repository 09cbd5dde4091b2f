"""Rosters come and go in many threads."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

import rankwise
from rankwise.adapters import roster as rosters
from rankwise.adapters.roster import Roster, living_rosters


def test_a_roster_made_while_another_thread_looks_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread makes an adapter at the worst moment: after the living were read, before the list was written."""
    config = rankwise.LoraConfig()
    freed = Roster("freed", config)
    kept = [Roster("kept", config)]
    pending = ["meanwhile"]

    def made_meanwhile(roster: Any, *callback: Any) -> Any:
        if pending:
            kept.append(Roster(pending.pop(), config))
        return weakref.ref(roster, *callback)

    del freed
    gc.collect()
    monkeypatch.setattr(rosters, "weakref", SimpleNamespace(ref=made_meanwhile))
    living_rosters()
    kept.append(Roster("last", config))
    found = living_rosters()
    assert [roster.adapter for roster in found if any(roster is other for other in kept)] == [r.adapter for r in kept]


def test_a_freed_roster_is_forgotten() -> None:
    before = len(rosters._ROSTERS)
    made = [Roster("one", rankwise.LoraConfig()) for _ in range(3)]
    assert len(living_rosters()) == len(rosters._ROSTERS) == before + 3
    del made[1]
    assert len(living_rosters()) == len(rosters._ROSTERS) == before + 2
    assert living_rosters()[-2:] == made
