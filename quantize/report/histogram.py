"""Histograms of block scales on a log2 axis.

The bars' areas are the shares, as E4M3's values are not evenly spaced there: with heights for
shares, any smooth distribution would show a step at every power of two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from quantize.nvfp4.format import E4M3_MAX, E4M3_MIN

PATTERNS = 127
"""Bit patterns 0 to 126: zero, then E4M3's positive finite values in ascending order."""

WIDTH, HEIGHT = 520, 130
"""Of the picture, in pixels."""

_LEFT, _RIGHT = math.log2(E4M3_MIN) - 1.5, math.log2(E4M3_MAX) + 0.5
_ZERO = _LEFT + 0.5
"""Where zero is drawn, an octave below the smallest value: it has no logarithm."""


def value(bits: int) -> float:
    """The E4M3 value of a bit pattern from 0 to 126."""
    exponent, mantissa = divmod(bits, 8)
    return math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)


def place(log2: float) -> float:
    """Where a value is on the axis, in pixels, by its logarithm."""
    return (log2 - _LEFT) / (_RIGHT - _LEFT) * WIDTH


def _edges(bits: int) -> tuple[float, float]:
    """Where a pattern's bar begins and ends, in log2: half way to its neighbours."""
    if bits == 0:
        return _ZERO - 0.25, _ZERO + 0.25
    here = math.log2(value(bits))
    below = math.log2(value(bits - 1)) if bits > 1 else here - 1
    above = math.log2(value(bits + 1)) if bits < PATTERNS - 1 else math.log2(480)
    return (here + below) / 2, (here + above) / 2


_EDGES = [_edges(bits) for bits in range(PATTERNS)]
SUBNORMAL_END = place(_EDGES[7][1])
TICKS = [(place(_ZERO), "0")] + [
    (place(e), f"{2.0**e:g}" if e >= -3 else f"1/{2**-e}") for e in range(-7, 9, 2)
]
"""Of the axis: where, in pixels, and what is written there."""


class Bar(NamedTuple):
    """One bit pattern that occurs; ``x``, ``width`` and ``height`` are in pixels."""

    value: float
    number: int
    x: float
    width: float
    height: float


def bars(counts: list[int]) -> list[Bar]:
    """Of the ``[127]`` counts of bit patterns: a bar for each that is not 0."""
    widths = [place(right) - place(left) for left, right in _EDGES]
    tallest = max((n / widths[bits] for bits, n in enumerate(counts)), default=0.0)
    return [
        Bar(
            value(bits),
            n,
            place(_EDGES[bits][0]),
            widths[bits],
            max(n / widths[bits] / tallest * HEIGHT, 1.0),  # a single scale must not vanish
        )
        for bits, n in enumerate(counts)
        if n
    ]
