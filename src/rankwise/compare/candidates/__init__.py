"""What a comparison can train: one file a kind, all behind `Candidate`."""

from __future__ import annotations

from rankwise.adapters.configs import CONFIGS
from rankwise.compare.candidates.adapter import AdapterCandidate
from rankwise.compare.candidates.base import Candidate, Measured
from rankwise.compare.candidates.head import HeadCandidate
from rankwise.compare.spec import HEAD, MethodEntry, Spec
from rankwise.errors import ArgumentError, nearest

__all__ = ["Candidate", "Measured", "candidate_of"]


def candidate_of(spec: Spec, entry: MethodEntry) -> Candidate:
    """What one method entry of a SPEC stands for.

    Raises:
        ArgumentError: there is no such method, or it has no such field, or a value breaks its rule.
    """
    if entry.name == HEAD:
        return HeadCandidate.of(spec, entry)
    if entry.name in CONFIGS:
        return AdapterCandidate.of(spec, entry)
    known = [*CONFIGS, HEAD]
    raise ArgumentError("methods", f"be methods of rankwise or {HEAD!r} ({nearest(entry.name, known)})", entry.name)
