"""Spectra of weights and updates: how far singular values and vectors drifted, conditioning, and ranks in use."""

from rankwise.spectral.condition import ConditionNumbers, condition_number, condition_numbers
from rankwise.spectral.drift import Drift, weight_drift, weight_drift_top_k
from rankwise.spectral.rank import effective_rank, energy_rank, stable_rank
from rankwise.spectral.spectrum import Spectrum, spectra

__all__ = [
    "ConditionNumbers",
    "Drift",
    "Spectrum",
    "condition_number",
    "condition_numbers",
    "effective_rank",
    "energy_rank",
    "spectra",
    "stable_rank",
    "weight_drift",
    "weight_drift_top_k",
]
