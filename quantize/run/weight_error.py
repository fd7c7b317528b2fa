"""What quantizing one weight lost."""

from __future__ import annotations

from typing import NamedTuple


class WeightError(NamedTuple):
    """What one weight lost: see ``quantize.nvfp4.kernels.Quantized``."""

    module: str
    noise: float
    signal: float
    counts: list[int]
