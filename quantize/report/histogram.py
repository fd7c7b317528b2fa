"""Histograms of block scales on a log2 axis.

The bars' areas are the shares, as E4M3's values are not evenly spaced there: with heights for
shares, any smooth distribution would show a step at every power of two.
"""

from __future__ import annotations

import math

from quantize.nvfp4.format import E4M3_MAX, E4M3_MIN
from quantize.report.markup import plural, text

PATTERNS = 127
"""Bit patterns 0 to 126: zero, then E4M3's positive finite values in ascending order."""

_LEFT, _RIGHT = math.log2(E4M3_MIN) - 1.5, math.log2(E4M3_MAX) + 0.5
_ZERO = _LEFT + 0.5
"""Where zero is drawn, an octave below the smallest value: it has no logarithm."""


def value(bits: int) -> float:
    """The E4M3 value of a bit pattern from 0 to 126."""
    exponent, mantissa = divmod(bits, 8)
    return math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)


def _edges(bits: int) -> tuple[float, float]:
    """Where a pattern's bar begins and ends, in log2: half way to its neighbours."""
    if bits == 0:
        return _ZERO - 0.25, _ZERO + 0.25
    here = math.log2(value(bits))
    below = math.log2(value(bits - 1)) if bits > 1 else here - 1
    above = math.log2(value(bits + 1)) if bits < PATTERNS - 1 else math.log2(480)
    return (here + below) / 2, (here + above) / 2


_EDGES = [_edges(bits) for bits in range(PATTERNS)]


def _bars(counts: list[int], width: int, height: int) -> list[tuple[int, float, float, float]]:
    """``(bits, x, width, height)`` in pixels of every bar that is not empty."""
    unit = width / (_RIGHT - _LEFT)
    dense = {b: n / (_EDGES[b][1] - _EDGES[b][0]) for b, n in enumerate(counts) if n}
    top = max(dense.values(), default=1.0)
    return [
        (
            bits,
            (_EDGES[bits][0] - _LEFT) * unit,
            (_EDGES[bits][1] - _EDGES[bits][0]) * unit,
            max(tall / top * height, 0.7),  # a single scale must not vanish
        )
        for bits, tall in dense.items()
    ]


def sparkline(counts: list[int], width: int = 150, height: int = 22) -> str:
    """The shape alone, for a row of the list of layers."""
    path = "".join(
        f"M{x:.1f} {height}v-{tall:.1f}h{wide:.1f}v{tall:.1f}z"
        for _, x, wide, tall in _bars(counts, width, height)
    )
    return (
        f'<svg class="spark" aria-hidden="true" width="{width}" height="{height + 1}">'
        f'<path class="axis" d="M0 {height + 0.5}h{width}"/><path class="bar" d="{path}"/></svg>'
    )


def histogram(name: str, counts: list[int], width: int = 520, height: int = 130) -> str:
    """A figure with an axis; each bar's title says its value and count."""
    total = sum(counts)
    unit = width / (_RIGHT - _LEFT)
    subnormal = sum(counts[1:8])
    highest = max((bits for bits in range(PATTERNS) if counts[bits]), default=0)
    alt = (
        f"Histogram of {name}'s {plural(total, 'block scale')}; "
        f"largest {value(highest):g}, {subnormal} subnormal, {counts[0]} zero"
    )
    shade = (_EDGES[7][1] - _LEFT) * unit
    parts = [
        f'<svg class="histogram" role="img" aria-label="{text(alt)}" width="{width}"'
        f' height="{height + 38}" viewBox="0 -4 {width} {height + 38}">',
        f'<rect class="shade" x="0" y="-4" width="{shade:.1f}" height="{height + 4}"/>',
        f'<text class="note" x="6" y="10">subnormal: {_share(subnormal, total)}</text>',
        f'<path class="axis" d="M0 {height + 0.5}h{width}"/>',
    ]
    for bits, x, wide, tall in _bars(counts, width, height):
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{height - tall:.1f}" width="{wide:.1f}"'
            f' height="{tall:.1f}"><title>{value(bits):g}: {counts[bits]:,}'
            f" ({_share(counts[bits], total)})</title></rect>"
        )
    for exponent in range(-7, 9, 2):
        x = (exponent - _LEFT) * unit
        name = f"{2.0**exponent:g}" if exponent >= -3 else f"1/{2**-exponent}"
        parts.append(
            f'<path class="axis" d="M{x:.1f} {height}v4"/>'
            f'<text class="tick" x="{x:.1f}" y="{height + 16}">{name}</text>'
        )
    zero = (_ZERO - _LEFT) * unit
    parts.append(f'<text class="tick" x="{zero:.1f}" y="{height + 16}">0</text>')
    parts.append(
        f'<text class="tick" x="{width / 2:g}" y="{height + 32}">E4M3 value, log2 axis</text>'
    )
    return f"<figure>{''.join(parts)}</svg></figure>"


def _share(count: int, total: int) -> str:
    """A percentage that is 0 only for a count of 0."""
    percent = 100 * count / total if total else 0.0
    return "<0.01%" if 0 < percent < 0.01 else f"{percent:.2f}%" if percent else "0%"
