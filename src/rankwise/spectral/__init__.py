"""Spectra of weights and updates: how far singular values and vectors drifted, conditioning, ranks in use, records."""

from rankwise.spectral.alignment import pretrained_lengths, subspace_alignment, update_cosine
from rankwise.spectral.condition import ConditionNumbers, condition_number, condition_numbers
from rankwise.spectral.drift import Drift, Pretrained, weight_drift, weight_drift_top_k
from rankwise.spectral.rank import (
    effective_rank,
    energy_curve,
    energy_rank,
    numerical_rank,
    stable_rank,
    subspace_use,
)
from rankwise.spectral.record import Directions, LayerRecord, Measured, Record, measure, read_record, write_record
from rankwise.spectral.spectrum import Spectrum, spectra

__all__ = [
    "ConditionNumbers",
    "Directions",
    "Drift",
    "LayerRecord",
    "Measured",
    "Pretrained",
    "Record",
    "Spectrum",
    "condition_number",
    "condition_numbers",
    "effective_rank",
    "energy_curve",
    "energy_rank",
    "measure",
    "numerical_rank",
    "pretrained_lengths",
    "read_record",
    "spectra",
    "stable_rank",
    "subspace_alignment",
    "subspace_use",
    "update_cosine",
    "weight_drift",
    "weight_drift_top_k",
    "write_record",
]
