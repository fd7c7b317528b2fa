"""Tiles ``[rows, 16]``: one block of some rows, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from quantize.nvfp4.kernels.triton_numbers import round_e2m1


@triton.jit
def column_of(tile, j):  # type: ignore[no-untyped-def]
    """Column ``j`` of a tile, ``[rows]``."""
    return tl.sum(tl.where(tl.arange(0, 16)[None, :] == j, tile, 0.0), 1)


@triton.jit
def with_column(tile, j, column):  # type: ignore[no-untyped-def]
    """A tile with another column ``j``."""
    return tl.where(tl.arange(0, 16)[None, :] == j, column[:, None], tile)


@triton.jit
def unit_of(x):  # type: ignore[no-untyped-def]
    """The E2M1 value nearest to ``x``, with ``x``'s sign bit."""
    size = round_e2m1(tl.abs(x)).to(tl.int32, bitcast=True)
    return (size | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def code_of(unit):  # type: ignore[no-untyped-def]
    """The code (int32) of an E2M1 value."""
    size = tl.abs(unit)
    above = (size.to(tl.int32, bitcast=True) >> 22) - 252
    code = tl.where(size < 1.0, (size * 2.0).to(tl.int32), above)
    return code | (((unit.to(tl.int32, bitcast=True) >> 31) & 1) << 3)


@triton.jit
def square(matrix, at, size):  # type: ignore[no-untyped-def]
    """The block ``[at : at + 16, at : at + 16]`` of a ``[size, size]`` matrix."""
    k = tl.arange(0, 16)
    return tl.load(matrix + (at + k).to(tl.int64)[:, None] * size + at + k[None, :])


@triton.jit
def without_earlier(  # type: ignore[no-untyped-def]
    tile, changes, matrix, row, inside, first, block, size, PANEL: tl.constexpr
):
    """Take from a panel's block what its earlier blocks have changed.

    Args:
        tile: the block as it was before its panel began.
        changes: float32 ``[rows, PANEL]``: of the panel's columns so far.
        matrix: float32 ``[size, size]``: how a change of one column changes the others.
        first: the panel's first column; the block is its ``block``-th.
    """
    k = tl.arange(0, 16)
    for before in range(block):
        change = tl.load(
            changes + row[:, None] * PANEL + 16 * before + k[None, :], mask=inside, other=0.0
        )
        passed = tl.load(
            matrix
            + (first + 16 * before + k).to(tl.int64)[:, None] * size
            + (first + 16 * block + k)[None, :]
        )
        tile -= tl.dot(change, passed, input_precision="ieee")
    return tile
