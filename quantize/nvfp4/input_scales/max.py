"""``max``: twice the largest input that was seen can be represented."""

from __future__ import annotations

from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX
from quantize.nvfp4.input_scales.magnitudes import Magnitudes

ROOM = 2.0
"""Inputs may be so many times as large as those that were seen before they are clipped. Block
scales are E4M3 numbers times the input scale, and E4M3 is equally precise over 15 octaves, so this
room costs nothing."""


def max_scale(magnitudes: Magnitudes) -> float:
    """ModelOpt's ``input_scale`` with room, ``ROOM * largest / (6 * 448)``."""
    return ROOM * magnitudes.largest / (E2M1_MAX * E4M3_MAX) if magnitudes.largest > 0 else 1.0
