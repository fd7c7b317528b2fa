"""``two_sided``'s inner loop, in numba: rows one after another, block by block.

Loops over the 16 columns of a block or over all of a row's have no branches and no sums in them, so
that LLVM turns them into vector instructions. The interpreter lock is released.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from quantize.nvfp4.format import BLOCK
from quantize.nvfp4.kernels.numba_cpu import E4M3, compiled, round_e2m1
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST

_SPAN = 2
"""E4M3 neighbours tried on either side of a block's scale."""
_PASSES = 4
"""At most, over a block's columns, after a first rounding."""

_F = np.float32
_BETTER = _F(1 - 1e-5)
"""What a block must get below, relative to what it has: less is rounding."""
_HOPELESS = _F(1.5)
"""Relative to the best so far: first roundings worse than this are not improved further. To improve
all takes less than 1 % more off the loss and nearly twice the time; more sweeps are worth more."""


def improve(*arrays: np.ndarray) -> float:
    """Arguments and result are :func:`_improve`'s, without the table."""
    return float(_improve(*arrays, E4M3))


@compiled
def _improve(base, output, moment, blocks, inverse, feedback, values, scales, pull, e4m3):  # type: ignore[no-untyped-def]
    """Improve a panel of rows in place; returns by how much that lowers the loss.

    Args:
        base: float32 ``[rows, in]``, overwritten: the panel's rows of ``G @ pull``, for all rows.
        output: float32 ``[rows, rows]``: the panel's own part of ``G``.
        moment: float32 ``[in, in]``.
        blocks, inverse, feedback: float32 ``[in / 16, 16, 16]``: see ``two_sided._blocks_of``.
        values: float32 ``[rows, in]``, in units of the global scale; improved.
        scales: uint8 ``[rows, in / 16]``: E4M3 bits; improved.
        pull: float32 ``[rows, in]``: errors times ``moment``; kept up to date.
        e4m3: float32 ``[127]``: values of those bits.
    """
    rows, columns = values.shape
    left = np.empty(columns, _F)
    work = np.empty((4, BLOCK), _F)
    gain = 0.0
    for r in range(rows):
        # With all other rows as they are, the loss is G[r, r] times d M d^T plus a constant: d is
        # from the row to its ideal, of which no more need be known than that d M is this.
        share = _F(1) / output[r, r]
        for k in range(columns):
            base[r, k] *= share
            left[k] = base[r, k]
        gained = _F(0)
        for b in range(columns // BLOCK):
            part = slice(BLOCK * b, BLOCK * (b + 1))
            found, now = values[r, part], scales[r, b]
            better, scale = _improve_block(
                left[part], found, now, blocks[b], inverse[b], feedback[b], e4m3, work
            )
            if better > _F(0):
                gained += better
                scales[r, b] = scale
                for j in range(BLOCK):
                    change = work[0, j] - found[j]
                    if change != _F(0):
                        found[j] = work[0, j]
                        for k in range(columns):
                            left[k] -= change * moment[BLOCK * b + j, k]
        if gained > _F(0):
            gain += gained * output[r, r]
            for k in range(columns):
                left[k] -= base[r, k]
                pull[r, k] += left[k]
            for s in range(r + 1, rows):
                coupling = output[s, r]
                for k in range(columns):
                    base[s, k] += coupling * left[k]
    return gain


@compiled
def _improve_block(left, found, now, moment, inverse, feedback, e4m3, work):  # type: ignore[no-untyped-def]
    """How much better (0: not) than ``found`` the best codes are, and their scale; the values are
    in ``work[0]`` if they are better."""
    best, ideal, trial, pull = work[0], work[1], work[2], work[3]
    _times(left, inverse, ideal)
    for j in range(BLOCK):
        ideal[j] += found[j]
        trial[j] = found[j]
    before = _quadratic(trial, ideal, moment, pull)
    least, scale = before * _BETTER, now
    # First what is there, then what each scale makes of the ideal.
    start = max(LOWEST, now - _SPAN)
    for candidate in range(start - 1, min(HIGHEST, now + _SPAN) + 1):
        bits = now if candidate < start else candidate
        step = e4m3[bits]
        if candidate >= start and not _round(ideal, feedback, step, least * _HOPELESS, trial, pull):
            continue
        error = _descend(trial, ideal, moment, step, least, pull)
        if error < least:
            least, scale = error, np.uint8(bits)
            for j in range(BLOCK):
                best[j] = trial[j]
    return (before - least if least < before * _BETTER else _F(0)), scale


@compiled
def _round(ideal, feedback, step, limit, trial, rest):  # type: ignore[no-untyped-def]
    """GPTQ in a block: into ``trial``, one column after another, and what each loses is made up for
    by those after it. False, and not all of it done, if the error is above ``limit``."""
    inverse = _F(1) / step
    error = _F(0)
    for j in range(BLOCK):
        rest[j] = ideal[j]
    for j in range(BLOCK):
        trial[j] = _nearest(rest[j], step, inverse)
        lost = rest[j] - trial[j]
        error += lost * lost * feedback[j, j]
        if error > limit:
            return False
        # All columns, since 16 are a vector: those up to this one are no longer looked at.
        for k in range(BLOCK):
            rest[k] -= lost * feedback[j, k]
    return True


@compiled
def _descend(trial, ideal, moment, step, least, pull):  # type: ignore[no-untyped-def]
    """Improve ``trial`` one column at a time; returns its error."""
    inverse = _F(1) / step
    _quadratic(trial, ideal, moment, pull)
    for _ in range(_PASSES):
        changed = False
        for j in range(BLOCK):
            own = moment[j, j]
            value = _nearest(trial[j] - pull[j] / own, step, inverse)
            change = value - trial[j]
            if change * (_F(2) * pull[j] + own * change) < _F(-1e-6) * least:
                changed = True
                trial[j] = value
                for k in range(BLOCK):
                    pull[k] += change * moment[j, k]
        if not changed:
            break
    error = _F(0)
    for j in range(BLOCK):
        error += pull[j] * (trial[j] - ideal[j])
    return error


@compiled
def _quadratic(trial, ideal, moment, pull):  # type: ignore[no-untyped-def]
    """The error of ``trial``; half its derivative is left in ``pull``."""
    for k in range(BLOCK):
        pull[k] = _F(0)
    for j in range(BLOCK):
        for k in range(BLOCK):
            pull[k] += (trial[j] - ideal[j]) * moment[j, k]
    error = _F(0)
    for j in range(BLOCK):
        error += pull[j] * (trial[j] - ideal[j])
    return error


@compiled
def _times(row, matrix, result):  # type: ignore[no-untyped-def]
    """``row @ matrix``, of a block."""
    for k in range(BLOCK):
        result[k] = _F(0)
    for j in range(BLOCK):
        for k in range(BLOCK):
            result[k] += row[j] * matrix[j, k]


@njit(inline="always")
def _nearest(x: Any, step: Any, inverse: Any) -> Any:
    """The E2M1 value nearest to ``x``, times ``step``; ``inverse`` is the step's reciprocal."""
    size = round_e2m1(abs(x) * inverse) * step
    return size if x >= _F(0) else -size
