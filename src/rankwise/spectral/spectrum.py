"""The spectra of a model's updates, layer by layer, without ever forming a dense ΔW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from rankwise.spectral.rank import effective_rank, energy_rank, stable_rank
from rankwise.spectral.stacks import stacked, stacks_of
from rankwise.update import Factors


class Spectrum(NamedTuple):
    """The singular values of one layer's update and the ranks they amount to."""

    singular_values: Tensor
    """The min(r, out, in) leading singular values of ΔW, falling, (k,), in float64."""
    effective_rank: float
    """See `rankwise.spectral.effective_rank`."""
    stable_rank: float
    """See `rankwise.spectral.stable_rank`."""

    def energy_rank(self, share: float) -> int:
        """The rank that keeps `share` of Σσ²; see `rankwise.spectral.energy_rank`."""
        return int(energy_rank(self.singular_values, share))


def spectra(updates: Mapping[str, Factors]) -> dict[str, Spectrum]:
    """The spectrum of every layer's update, as `rankwise.factors(model)` gives them.

    From `Factors.orthogonal()`: two QR decompositions and an r × r SVD for all layers of one shape at once.

    Args:
        updates: one layer's Factors by module name: B (out, r), s (r,), A (r, in), no stacks.

    Returns:
        A Spectrum by name, in the order given. An update of zeros, or of rank 0, has ranks 0.

    Raises:
        ArgumentError: Factors of a stack of layers, or a NaN or infinity in a factor; the message names the layer.

    >>> import torch
    >>> B, s, A = torch.eye(5, 3), torch.tensor([4.0, 4.0, 0.0]), torch.eye(3, 6)
    >>> layer = spectra({"encoder.query": Factors(B, s, A)})["encoder.query"]
    >>> layer.singular_values.tolist(), layer.stable_rank, layer.energy_rank(0.99)
    ([4.0, 4.0, 0.0], 2.0, 2)
    """
    found: dict[str, Spectrum] = {}
    for names in stacks_of(updates):
        S = stacked("updates", names, updates).singular_values()
        effective, stable = effective_rank(S).tolist(), stable_rank(S).tolist()
        for place, name in enumerate(names):
            found[name] = Spectrum(S[place], effective[place], stable[place])
    return {name: found[name] for name in updates}
