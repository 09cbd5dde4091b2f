"""Uniform numbers that a seed and a counter determine: the same after a restart, on every process and every device.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): the k-th
number is a fixed scrambling of seed + k·GOLDEN, so that no state has to be kept or read back from a device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """The whole number modulo 2⁶⁴ as int64 holds it."""
    return (x + 2**63) % 2**64 - 2**63


GOLDEN = _signed(0x9E3779B97F4A7C15)
BITS = 23
"""Random bits of one number: float32 holds (k + ½)/2²³ exactly, which is never 0 or 1."""


def new_seed() -> Tensor:
    """A seed (1,), int64, from torch's own generator, hence another one for another `torch.manual_seed`."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)


def uniform(seeds: Tensor, counter: int, count: int) -> Tensor:
    """`count` numbers in (0, 1) for each seed, unrelated between seeds, counters and places.

    Args:
        seeds: int64 (…).
        counter: says which numbers of these seeds, for example those of a training step.
        count: how many.

    Returns:
        float32 (…, count), on the device of the seeds.

    >>> [round(float(x), 4) for x in uniform(torch.tensor([7]), 1, 3)[0]]
    [0.7215, 0.6497, 0.5494]
    """
    streams = _scrambled(seeds + _signed(counter * GOLDEN))
    places = torch.arange(1, count + 1, device=seeds.device) * GOLDEN
    bits = _shifted_right(_scrambled(streams.unsqueeze(-1) + places), 64 - BITS)
    return (bits.float() + 0.5) * 2.0**-BITS


def _scrambled(z: Tensor) -> Tensor:
    """SplitMix64's bijection of 64 bits; products of int64 wrap around, as they must here."""
    z = (z ^ _shifted_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted_right(z, 31)


def _shifted_right(z: Tensor, bits: int) -> Tensor:
    """A shift that fills with zeros; torch's own fills with the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
