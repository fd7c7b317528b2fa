"""GPTQ's columns: rows are independent once the factor is known, so each program has some rows.

A program goes through the 128 columns of a panel, one block of 16 at a time in registers. What a
block's columns lose it takes from the panel's later blocks; one matrix product takes it from all
columns after the panel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantize.nvfp4.format import BLOCK
from quantize.nvfp4.kernels.triton_numbers import e4m3_bits, e4m3_value, round_e2m1
from quantize.nvfp4.rounding.kernels import PANEL
from quantize.nvfp4.rounding.kernels.launch import on
from quantize.nvfp4.rounding.kernels.tiles import (
    code_of,
    column_of,
    unit_of,
    with_column,
    without_earlier,
)
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST

ROWS = 16
"""So many rows has a program."""
WARPS = 2


@triton.jit
def _panel(  # type: ignore[no-untyped-def]
    left, factor, codes, scales, lost, rows, columns, first, blocks,
    PANEL: tl.constexpr, ROWS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """Round a panel of some rows.

    Args:
        left: float32 ``[rows, columns]``: what is to be rounded, in units of the global scale.
        factor: float32 ``[columns, columns]``: see ``gptq.compensation``.
        codes: uint8 ``[rows, columns]``, one code a byte; scales: uint8 ``[rows, columns / 16]``.
        lost: float32 ``[rows, PANEL]``: what each column loses, over the factor's diagonal.
        first: the panel's first column; blocks: how many it has.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, 16)
    inside = (row < rows)[:, None]
    for block in range(blocks):
        at = first + 16 * block
        place = row[:, None] * columns + at + k[None, :]
        tile = tl.load(left + place, mask=inside, other=0.0)
        tile = without_earlier(tile, lost, factor, row, inside, first, block, columns, PANEL)

        diagonal = tl.load(factor + (at + k).to(tl.int64) * (columns + 1))
        importance = tl.math.div_rn(tl.full([16], 1.0, tl.float32), diagonal * diagonal)
        amax = tl.max(tl.abs(tile), 1)
        sixth = tl.math.div_rn(amax, tl.full([ROWS], 6.0, tl.float32))
        start = e4m3_bits(tl.minimum(tl.maximum(sixth, 0.001953125), 448.0))
        chosen = start
        best = tl.full([ROWS], float("inf"), tl.float32)
        # The max rule's own scale comes first and wins ties, as in ``mse``.
        for step in range(-9, 9):
            offset = tl.where(step < -8, 0, step)
            bits = tl.minimum(tl.maximum(start + offset, LOWEST), HIGHEST)
            scale = e4m3_value(bits)[:, None] + tl.zeros([ROWS, 16], tl.float32)
            size = tl.abs(tile)
            miss = size - round_e2m1(tl.math.div_rn(size, scale)) * scale
            error = tl.sum(miss * miss * importance[None, :], 1)
            chosen = tl.where(error < best, bits, chosen)
            best = tl.minimum(error, best)
        tl.store(scales + row * (columns // 16) + at // 16, chosen.to(tl.uint8), mask=row < rows)

        scale = e4m3_value(chosen)
        units = tl.zeros([ROWS, 16], tl.float32)
        shares = tl.zeros([ROWS, 16], tl.float32)
        for j in tl.static_range(16):
            now = column_of(tile, j)
            unit = unit_of(tl.math.div_rn(now, scale))
            own = tl.load(factor + (at + j).to(tl.int64) * (columns + 1))
            share = tl.math.div_rn(now - unit * scale, tl.zeros([ROWS], tl.float32) + own)
            later = tl.load(factor + (at + j).to(tl.int64) * columns + at + k)
            tile -= share[:, None] * later[None, :]
            units = with_column(units, j, unit)
            shares = with_column(shares, j, share)
        tl.store(codes + place, code_of(units).to(tl.uint8), mask=inside)
        tl.store(lost + row[:, None] * PANEL + 16 * block + k[None, :], shares, mask=inside)
        tl.debug_barrier()  # other threads of the program read what this one has lost


def round_columns(left: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round all columns; the same as ``gptq.round_columns``, which says what is what."""
    left, factor = left.contiguous(), factor.contiguous()
    rows, columns = left.shape
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    scales = torch.empty(rows, columns // BLOCK, dtype=torch.uint8, device=left.device)
    lost = torch.empty(rows, PANEL, device=left.device)
    with on(left.device):
        for first in range(0, columns, PANEL):
            end = min(first + PANEL, columns)
            _panel[(triton.cdiv(rows, ROWS),)](
                left, factor, codes, scales, lost, rows, columns, first, (end - first) // BLOCK,
                PANEL=PANEL, ROWS=ROWS, LOWEST=LOWEST, HIGHEST=HIGHEST,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            if end < columns:
                left[:, end:].addmm_(lost[:, : end - first], factor[first:end, end:], alpha=-1)
    return codes, scales.view(torch.float8_e4m3fn)
