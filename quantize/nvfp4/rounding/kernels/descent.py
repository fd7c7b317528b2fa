"""The descent's half-sweeps: as in GPTQ, each program has some rows of a panel.

A program keeps the residual of its panel's blocks exact, and one matrix product passes on what the
panel has changed to the residual of all columns. So a half-sweep is a kernel and a product for
each 128 columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from quantize.nvfp4.format import BLOCK
from quantize.nvfp4.kernels.triton_numbers import e4m3_value
from quantize.nvfp4.rounding.blocks import codes_of, values_of
from quantize.nvfp4.rounding.kernels import PANEL
from quantize.nvfp4.rounding.kernels.launch import on
from quantize.nvfp4.rounding.kernels.tiles import (
    column_of,
    square,
    unit_of,
    with_column,
    without_earlier,
)
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST

ROWS = 16
"""So many rows has a program."""
WARPS = 2


@triton.jit
def _columns(  # type: ignore[no-untyped-def]
    residual, hessian, inverse, values, scales, changes, rows, columns, first, blocks,
    PANEL: tl.constexpr, ROWS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """Give every column of a panel its best codes. The arguments are those of :func:`_blocks`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, 16)
    inside = (row < rows)[:, None]
    for block in range(blocks):
        at = first + 16 * block
        place = row[:, None] * columns + at + k[None, :]
        rest = tl.load(residual + place, mask=inside, other=0.0)
        rest = without_earlier(rest, changes, hessian, row, inside, first, block, columns, PANEL)
        found = tl.load(values + place, mask=inside, other=0.0)
        before = found
        bits = tl.load(scales + row * (columns // 16) + at // 16, mask=row < rows, other=8)
        scale = e4m3_value(bits.to(tl.int32))
        for j in tl.static_range(16):
            own = tl.load(hessian + (at + j).to(tl.int64) * (columns + 1))
            across = tl.load(hessian + (at + j).to(tl.int64) * columns + at + k)
            old = column_of(found, j)
            best = old + tl.math.div_rn(column_of(rest, j), tl.zeros([ROWS], tl.float32) + own)
            new = unit_of(tl.math.div_rn(best, scale)) * scale
            rest -= (new - old)[:, None] * across[None, :]
            found = with_column(found, j, new)
        tl.store(values + place, found, mask=inside)
        change = changes + row[:, None] * PANEL + 16 * block + k[None, :]
        tl.store(change, found - before, mask=inside)
        tl.debug_barrier()  # other threads of the program read what this one has changed


@triton.jit
def _blocks(  # type: ignore[no-untyped-def]
    residual, hessian, inverse, values, scales, changes, rows, columns, first, blocks,
    PANEL: tl.constexpr, ROWS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """Give every block of a panel another scale, and codes that fit it, where that is better.

    Args:
        residual: float32 ``[rows, columns]``: the errors times ``hessian``, before the panel.
        hessian: float32 ``[columns, columns]``.
        inverse: float32 ``[columns / 16, 16, 16]``: of the blocks on its diagonal.
        values: float32 ``[rows, columns]``; scales: uint8 ``[rows, columns / 16]``, E4M3 bits; both
            changed in place.
        changes: float32 ``[rows, PANEL]``: becomes how the panel's values changed.
        first: the panel's first column; blocks: how many it has.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, 16)
    inside = (row < rows)[:, None]
    for block in range(blocks):
        at = first + 16 * block
        place = row[:, None] * columns + at + k[None, :]
        rest = tl.load(residual + place, mask=inside, other=0.0)
        rest = without_earlier(rest, changes, hessian, row, inside, first, block, columns, PANEL)
        found = tl.load(values + place, mask=inside, other=0.0)
        inner = square(hessian, at, columns)
        diagonal = tl.load(hessian + (at + k).to(tl.int64) * (columns + 1))
        over = tl.math.div_rn(tl.full([16], 1.0, tl.float32), diagonal)
        # What would be best for the block, with all other blocks as they are.
        step = tl.dot(rest, tl.load(inverse + at * 16 + k[:, None] * 16 + k[None, :]),
                      input_precision="ieee")  # fmt: skip
        ideal = found + step
        before = tl.sum(tl.dot(step, inner, input_precision="ieee") * step, 1)
        own_scale = scales + row * (columns // 16) + at // 16
        start = tl.load(own_scale, mask=row < rows, other=8).to(tl.int32)
        least, chosen, kept = before, start, found
        for offset in range(-8, 9):
            bits = tl.minimum(tl.maximum(start + offset, LOWEST), HIGHEST)
            scale = e4m3_value(bits)
            once = tl.math.div_rn(tl.full([ROWS], 1.0, tl.float32), scale)
            got = unit_of(ideal * once[:, None]) * scale[:, None]
            miss = tl.dot(ideal - got, inner, input_precision="ieee")
            for j in tl.static_range(16):
                across = tl.load(hessian + (at + j).to(tl.int64) * columns + at + k)
                old = column_of(got, j)
                best = column_of(got + miss * over[None, :], j)
                new = unit_of(best * once) * scale
                miss -= (new - old)[:, None] * across[None, :]
                got = with_column(got, j, new)
            error = tl.sum(miss * (ideal - got), 1)
            better = error < least
            least = tl.where(better, error, least)
            chosen = tl.where(better, bits, chosen)
            kept = tl.where(better[:, None], got, kept)
        tl.store(values + place, kept, mask=inside)
        tl.store(own_scale, chosen.to(tl.uint8), mask=row < rows)
        change = changes + row[:, None] * PANEL + 16 * block + k[None, :]
        tl.store(change, kept - found, mask=inside)
        tl.debug_barrier()  # other threads of the program read what this one has changed


class Descent:
    """``descent.Descent`` on a GPU: the same arguments, the same steps in the same order.

    Unlike that one it makes copies of ``codes`` and ``scales``.
    """

    def __init__(
        self,
        target: torch.Tensor,
        hessian: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        self._bits = scales.to(torch.float8_e4m3fn).view(torch.uint8).contiguous()
        self._hessian = hessian.contiguous()
        self._values = (values_of(codes) * scales.repeat_interleave(BLOCK, 1)).contiguous()
        with on(target.device):
            self._residual = (target - self._values) @ self._hessian
        count = len(hessian) // BLOCK
        which = torch.arange(count, device=hessian.device)
        inner = self._hessian.view(count, BLOCK, count, BLOCK)[which, :, which]
        self._inverse = torch.linalg.inv(inner.double()).float().contiguous()

    @property
    def scales(self) -> torch.Tensor:
        """The scales as they are now, float32 ``[out, in / 16]``."""
        return self._bits.view(torch.float8_e4m3fn).float()

    @property
    def codes(self) -> torch.Tensor:
        """The codes as they are now, uint8 ``[out, in]``, one code a byte."""
        return codes_of(self._values / self.scales.repeat_interleave(BLOCK, 1))

    def columns(self) -> None:
        """Give every column in turn its best codes."""
        self._half_sweep(_columns)

    def blocks(self) -> None:
        """Give every block in turn another scale, and codes that fit it, where that is better."""
        self._half_sweep(_blocks)

    def _half_sweep(self, kernel: Any) -> None:
        rows, columns = self._values.shape
        changes = torch.empty(rows, PANEL, device=self._values.device)
        with on(self._values.device):
            for first in range(0, columns, PANEL):
                end = min(first + PANEL, columns)
                kernel[(triton.cdiv(rows, ROWS),)](
                    self._residual, self._hessian, self._inverse, self._values, self._bits,
                    changes, rows, columns, first, (end - first) // BLOCK,
                    PANEL=PANEL, ROWS=ROWS, LOWEST=LOWEST, HIGHEST=HIGHEST, num_warps=WARPS,
                )  # fmt: skip
                self._residual.addmm_(changes[:, : end - first], self._hessian[first:end], alpha=-1)
