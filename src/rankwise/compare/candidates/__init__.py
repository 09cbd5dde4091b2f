"""What a comparison can train: one file a kind, all behind `Candidate`."""

from __future__ import annotations

from rankwise.adapters.configs import CONFIGS
from rankwise.compare.candidates.adapter import AdapterCandidate
from rankwise.compare.candidates.base import Candidate, Measured
from rankwise.compare.candidates.fine_tuning import FULL, PARTIAL, FineTuningCandidate
from rankwise.compare.candidates.head import HeadCandidate
from rankwise.compare.candidates.pretrained import PretrainedCandidate
from rankwise.compare.candidates.shrunk import SHRUNK, ShrunkCandidate
from rankwise.compare.candidates.stock import CONFIGS as OF_PEFT
from rankwise.compare.candidates.stock import PREFIX, VARIANTS, StockCandidate
from rankwise.compare.spec import HEAD, PRETRAINED, Entry, Spec
from rankwise.errors import ArgumentError, nearest

__all__ = ["NAMES", "Candidate", "Measured", "candidate_of"]

_BY_NAME = {
    **dict.fromkeys(CONFIGS, AdapterCandidate),
    FULL: FineTuningCandidate,
    PARTIAL: FineTuningCandidate,
    HEAD: HeadCandidate,
    PRETRAINED: PretrainedCandidate,
    SHRUNK: ShrunkCandidate,
}
NAMES = tuple(_BY_NAME)
"""Every name that a method of a SPEC may have, but for the config classes of PEFT."""


def candidate_of(spec: Spec, entry: Entry) -> Candidate:
    """What one method entry of a SPEC stands for.

    Raises:
        ArgumentError: there is no such method, or it has no such field, or a value breaks its rule.
    """
    if entry.name.startswith(PREFIX):
        return StockCandidate.of(spec, entry)
    called = entry.name.lower()
    if called in VARIANTS:
        rule = f'be written as a config of PEFT: [[method]] with name = "peft.LoraConfig" and {VARIANTS[called]}'
        raise ArgumentError("methods", rule, entry.name)
    if entry.name in OF_PEFT:
        raise ArgumentError("methods", f"name a config class of PEFT as {PREFIX}{entry.name}", entry.name)
    if entry.name not in _BY_NAME:
        others = f"{SHRUNK}, {FULL}, {PARTIAL}, {HEAD}, {PRETRAINED} or a config class as {PREFIX}NAME"
        rule = f"be methods of rankwise, {others} ({nearest(entry.name, _BY_NAME)})"
        raise ArgumentError("methods", rule, entry.name)
    return _BY_NAME[entry.name].of(spec, entry)
