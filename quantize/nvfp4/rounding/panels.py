"""The inner loop of ``two_sided``, in numba: it improves one row after another, block by block.

Loops over the 16 columns of a block, or over all columns of a row, contain neither branches nor
sums, so LLVM turns them into vector instructions. The functions release the interpreter lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from quantize.nvfp4.format import BLOCK
from quantize.nvfp4.kernels.numba_cpu import E4M3, exact, round_e2m1
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST

_SPAN = 2
"""So many E4M3 neighbours are tried on either side of a block's scale."""
_PASSES = 4
"""At most so many passes over a block's columns follow its first rounding."""

_F = np.float32
_BETTER = _F(1 - 1e-5)
"""An improved block's error must be below this share of its present error; a smaller difference may
be float32's own rounding."""
_HOPELESS = _F(1.5)
"""A first rounding is not improved further if its error is above this multiple of the best so far.
Improving all of them lowers the loss by less than 1 % and nearly doubles the time; more sweeps are
worth more."""


def improve(*arrays: np.ndarray) -> float:
    """Call :func:`_improve`, whose arguments and result these are, with its table."""
    return float(_improve(*arrays, E4M3))


@exact
def _improve(  # type: ignore[no-untyped-def]
    base, output_hessian, hessian, blocks, inverse, feedback, values, scales, residual, e4m3
):
    """Improve a panel of rows in place; return by how much that lowers the loss.

    Args:
        base: float32 ``[rows, in]``, overwritten: the panel's rows of ``G @ residual``, where
            ``residual`` is that of all rows of the weight.
        output_hessian: float32 ``[rows, rows]``: the panel's own part of ``G``.
        hessian: float32 ``[in, in]``.
        blocks, inverse, feedback: float32 ``[in / 16, 16, 16]``: see ``two_sided.blocks_of``.
        values: float32 ``[rows, in]``, in units of the global scale; improved in place.
        scales: uint8 ``[rows, in / 16]``: E4M3 bits; improved in place.
        residual: float32 ``[rows, in]``: the rows' errors times ``hessian``; kept up to date.
        e4m3: float32 ``[127]``: the values of E4M3 bits.
    """
    rows, columns = values.shape
    left = np.empty(columns, _F)
    work = np.empty((4, BLOCK), _F)
    gain = 0.0
    for r in range(rows):
        # With all other rows as they are, the loss is G[r, r] times d H d^T plus a constant, where
        # d leads from the row to its ideal. All that is needed of d is d H, which this is.
        share = _F(1) / output_hessian[r, r]
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
                            left[k] -= change * hessian[BLOCK * b + j, k]
        if gained > _F(0):
            gain += gained * output_hessian[r, r]
            for k in range(columns):
                left[k] -= base[r, k]
                residual[r, k] += left[k]
            for s in range(r + 1, rows):
                coupling = output_hessian[s, r]
                for k in range(columns):
                    base[s, k] += coupling * left[k]
    return gain


@exact
def _improve_block(left, found, now, hessian, inverse, feedback, e4m3, work):  # type: ignore[no-untyped-def]
    """Search for a better scale and better codes for one block of one row.

    Args:
        left: float32 ``[16]``: the row's ``d H``, see :func:`_improve`, in the block's columns.
        found: float32 ``[16]``: the present values.
        now: the present scale's E4M3 bits.
        work: float32 ``[4, 16]``: scratch; its first row holds the new values if they are better.

    Returns:
        by how much the block's error falls (0: no better ones were found), and the scale's bits.
    """
    best, ideal, trial, gradient = work[0], work[1], work[2], work[3]
    _times(left, inverse, ideal)
    for j in range(BLOCK):
        ideal[j] += found[j]
        trial[j] = found[j]
    before = _quadratic(trial, ideal, hessian, gradient)
    least, scale = before * _BETTER, now
    # First improve the present codes, then try each scale on the ideal.
    start = max(LOWEST, now - _SPAN)
    for candidate in range(start - 1, min(HIGHEST, now + _SPAN) + 1):
        bits = now if candidate < start else candidate
        step = e4m3[bits]
        limit = least * _HOPELESS
        if candidate >= start and not _round(ideal, feedback, step, limit, trial, gradient):
            continue
        error = _descend(trial, ideal, hessian, step, least, gradient)
        if error < least:
            least, scale = error, np.uint8(bits)
            for j in range(BLOCK):
                best[j] = trial[j]
    return (before - least if least < before * _BETTER else _F(0)), scale


@exact
def _round(ideal, feedback, step, limit, trial, rest):  # type: ignore[no-untyped-def]
    """Round a block into ``trial`` as GPTQ does: later columns make up for what a column loses.

    Return False, before all columns are rounded, as soon as the error is above ``limit``.
    """
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
        # For all columns, since 16 are one vector; nothing reads those up to this one again.
        for k in range(BLOCK):
            rest[k] -= lost * feedback[j, k]
    return True


@exact
def _descend(trial, ideal, hessian, step, least, gradient):  # type: ignore[no-untyped-def]
    """Improve ``trial`` one column at a time; return its error."""
    inverse = _F(1) / step
    _quadratic(trial, ideal, hessian, gradient)
    for _ in range(_PASSES):
        changed = False
        for j in range(BLOCK):
            own = hessian[j, j]
            value = _nearest(trial[j] - gradient[j] / own, step, inverse)
            change = value - trial[j]
            if change * (_F(2) * gradient[j] + own * change) < _F(-1e-6) * least:
                changed = True
                trial[j] = value
                for k in range(BLOCK):
                    gradient[k] += change * hessian[j, k]
        if not changed:
            break
    error = _F(0)
    for j in range(BLOCK):
        error += gradient[j] * (trial[j] - ideal[j])
    return error


@exact
def _quadratic(trial, ideal, hessian, gradient):  # type: ignore[no-untyped-def]
    """Return the error of ``trial``; leave half the error's derivative in ``gradient``."""
    for k in range(BLOCK):
        gradient[k] = _F(0)
    for j in range(BLOCK):
        for k in range(BLOCK):
            gradient[k] += (trial[j] - ideal[j]) * hessian[j, k]
    error = _F(0)
    for j in range(BLOCK):
        error += gradient[j] * (trial[j] - ideal[j])
    return error


@exact
def _times(row, matrix, result):  # type: ignore[no-untyped-def]
    """Write ``row @ matrix``, of one block, into ``result``."""
    for k in range(BLOCK):
        result[k] = _F(0)
    for j in range(BLOCK):
        for k in range(BLOCK):
            result[k] += row[j] * matrix[j, k]


@njit(inline="always")
def _nearest(x: Any, step: Any, inverse: Any) -> Any:
    """Return the multiple of ``step`` by an E2M1 value that is nearest to ``x``; ``inverse`` is the
    reciprocal of ``step``."""
    size = round_e2m1(abs(x) * inverse) * step
    return size if x >= _F(0) else -size
