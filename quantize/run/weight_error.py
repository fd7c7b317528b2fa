"""What quantizing one weight lost."""

from __future__ import annotations

from typing import NamedTuple


class WeightError(NamedTuple):
    """What quantizing one weight lost.

    Attributes:
        module: the weight's module path.
        noise: ``sum((dequantized - weight) ** 2)``.
        signal: ``sum(weight ** 2)``.
        counts: how many of its blocks have the scale of each E4M3 bit pattern, 127 numbers.
    """

    module: str
    noise: float
    signal: float
    counts: list[int]
