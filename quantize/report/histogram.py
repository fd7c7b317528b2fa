"""Histograms of block scales: a bar for each E4M3 bit pattern, eight to an octave."""

from __future__ import annotations

import math


def value(bits: int) -> float:
    """The E4M3 value of a bit pattern from 0 to 126."""
    exponent, mantissa = divmod(bits, 8)
    return math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)


def label(bits: int) -> str:
    """The value of a pattern that is a power of two, or 0, as the axis has it."""
    number = value(bits)
    return f"{number:g}" if not 0 < number < 0.1 else f"1/{1 / number:g}"
