"""The two-sided descent of many weights side by side: one program is one weight's chain of steps.

With a Hessian of the outputs, rows depend on each other, so a weight's steps come one after another
however many processors there are. But weights do not depend on each other, so a GPU goes through as
many as fit into its memory. The order is blocks of 16 columns first, and within a block all rows:
``two_sided`` takes all blocks of a row first. Both are exact block-coordinate descent, in which no
step raises the loss.

A step tries eight candidates at once, as the columns of a tile ``[16, 8]``: the present codes at
the present scale, and seven neighbouring scales, each first rounded as GPTQ does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from quantize.nvfp4.format import BLOCK
from quantize.nvfp4.kernels.triton_numbers import e4m3_value
from quantize.nvfp4.rounding.blocks import codes_of, values_of
from quantize.nvfp4.rounding.kernels import PANEL
from quantize.nvfp4.rounding.kernels.launch import on
from quantize.nvfp4.rounding.kernels.tiles import unit_of
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST

CHUNK = 32
"""What a row changes, a program takes at once from so many rows; later ones take it by a product."""
_ROWS = 512
"""So many rows has a launch; the rows after it take what they changed by a matrix product of all
weights."""
_PASSES = 4
"""At most so many passes over a block's columns follow its first rounding."""


@triton.jit
def _at(tile, j):  # type: ignore[no-untyped-def]
    """Row ``j`` of a tile ``[16, 8]``: one column of the weight, of all candidates."""
    return tl.sum(tl.where(tl.arange(0, 16)[:, None] == j, tile, 0.0), 0)


@triton.jit
def _improve(  # type: ignore[no-untyped-def]
    left, found, now, inner, inverse, feedback,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Search for a better scale and better codes for one block of one row.

    Args:
        left: float32 ``[16]``: (ideal - found) times the block's Hessian.
        found: float32 ``[16]``: the present values; now: the present scale's bits, int32.
        inner, inverse, feedback: of the block, see ``two_sided.blocks_of``.

    Returns:
        by how much the block's error falls (0: nothing better), the new values, the scale's bits,
        and how the new values differ from ``found``, times the Hessian.
    """
    k = tl.arange(0, 16)
    candidate = tl.arange(0, 8)
    present = candidate == 0
    near = tl.minimum(tl.maximum(now + candidate - 4, LOWEST), HIGHEST)
    bits = tl.where(present, now, near)
    scale = e4m3_value(bits)
    once = tl.math.div_rn(tl.full([8], 1.0, tl.float32), scale)
    whole = tl.load(inverse + k[:, None] * 16 + k[None, :])
    ideal = tl.sum(whole * left[:, None], 0) + found
    target = ideal[:, None] + tl.zeros([16, 8], tl.float32)

    # Each scale is first rounded as GPTQ does: later columns make up for what a column loses.
    rest = target
    trial = tl.zeros([16, 8], tl.float32)
    for j in tl.static_range(16):
        x = _at(rest, j)
        value = unit_of(x * once) * scale
        rest -= tl.load(feedback + 16 * j + k)[:, None] * (x - value)[None, :]
        trial = tl.where(k[:, None] == j, value[None, :], trial)
    trial = tl.where(present[None, :], found[:, None], trial)
    gradient = tl.zeros([16, 8], tl.float32)
    miss = trial - target
    for j in tl.static_range(16):
        gradient += tl.load(inner + 16 * j + k)[:, None] * _at(miss, j)[None, :]
    error = tl.sum(gradient * miss, 0)
    before = tl.sum(tl.where(present, error, 0.0), 0)

    # Then each column in turn gets what is best with the others as they are. A first rounding far
    # from the best one is hopeless.
    alive = present | (error <= 1.5 * tl.min(error, 0))
    least = -1e-6 * before
    passes = 0
    going = 1
    while (passes < PASSES) & (going > 0):
        changed = tl.zeros([8], tl.int32)
        for j in tl.static_range(16):
            own = tl.load(inner + 17 * j)
            slope = _at(gradient, j)
            old = _at(trial, j)
            value = unit_of((old - tl.math.div_rn(slope, tl.zeros([8], tl.float32) + own)) * once)
            change = value * scale - old
            better = alive & (change * (2.0 * slope + own * change) < least)
            change = tl.where(better, change, 0.0)
            trial = tl.where(
                (k[:, None] == j) & better[None, :], (value * scale)[None, :], trial
            )
            gradient += tl.load(inner + 16 * j + k)[:, None] * change[None, :]
            changed |= better.to(tl.int32)
        going = tl.max(changed, 0)
        passes += 1
    error = tl.sum(gradient * (trial - target), 0)
    best = tl.min(error, 0)
    # A smaller difference may be float32's own rounding.
    gain = tl.where(best < before * 0.99999, before - best, 0.0)
    which = tl.min(tl.where(error == best, candidate, 8), 0)
    chosen = tl.sum(tl.where(candidate[None, :] == which, trial, 0.0), 1)
    slopes = tl.sum(tl.where(candidate[None, :] == which, gradient, 0.0), 1)
    scale_bits = tl.sum(tl.where(candidate == which, bits, 0), 0)
    values = tl.where(gain > 0, chosen, found)
    shift = tl.where(gain > 0, slopes + left, 0.0)
    return gain, values, tl.where(gain > 0, scale_bits, now), shift


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    base, outputs, here, values, bits, changes, inner, inverse, feedback, gains,
    rows, columns, first, count, block,
    PANEL: tl.constexpr, CHUNK: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    PASSES: tl.constexpr,
):  # fmt: skip
    """Improve one block of some rows of each weight, one row after another.

    All arguments have the weights in their first dimension.

    Args:
        base: float32 ``[count, 16]``: these rows of ``outputs @ here``.
        outputs: float32 ``[rows, rows]``: the Hessian of the outputs.
        here: float32 ``[rows, 16]``: the residual in the block's columns; kept up to date.
        values: float32 ``[rows, columns]``; bits: uint8 ``[rows, columns / 16]``, E4M3 bits; both
            improved in place.
        changes: float32 ``[rows, PANEL]``: how the values of the block's panel have changed.
        inner, inverse, feedback: float32 ``[columns / 16, 16, 16]``, see ``two_sided.blocks_of``.
        gains: float64 scalars, to which the falls of the losses are added.
        first: the first row; count: how many; block: the block's number in the weight.
    """
    weight = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, 16)
    base += weight * count * 16
    outputs += weight * rows * rows
    here += weight * rows * 16
    values += weight * rows * columns
    bits += weight * rows * (columns // 16)
    changes += weight * rows * PANEL
    own_block = (weight * (columns // 16) + block) * 256
    inner += own_block
    inverse += own_block
    feedback += own_block
    place = 16 * (block % (PANEL // 16))
    total = 0.0
    for chunk in range(0, count, CHUNK):
        near = chunk + tl.arange(0, CHUNK)
        inside = near < count
        row = (first + near).to(tl.int64)
        tile = tl.load(base + near[:, None] * 16 + k[None, :], mask=inside[:, None], other=0.0)
        for earlier in range(0, chunk, CHUNK):
            then = earlier + tl.arange(0, CHUNK)
            coupling = tl.load(
                outputs + row[:, None] * rows + (first + then)[None, :],
                mask=inside[:, None], other=0.0,
            )  # fmt: skip
            shift = tl.load(base + then[:, None] * 16 + k[None, :])
            tile -= tl.dot(coupling, shift, input_precision="ieee")
        for i in range(min(CHUNK, count - chunk)):
            r = (first + chunk + i).to(tl.int64)
            own = tl.load(outputs + r * (rows + 1))
            left = tl.sum(tl.where((near == chunk + i)[:, None], tile, 0.0), 0)
            left = tl.math.div_rn(left, tl.zeros([16], tl.float32) + own)
            value = values + r * columns + block * 16 + k
            scale = bits + r * (columns // 16) + block
            found = tl.load(value)
            gain, new, chosen, shift = _improve(
                left, found, tl.load(scale).to(tl.int32), inner, inverse, feedback,
                LOWEST, HIGHEST, PASSES,
            )  # fmt: skip
            total += gain * own
            tl.store(value, new)
            tl.store(scale, chosen.to(tl.uint8))
            tl.store(changes + r * PANEL + place + k, new - found)
            rest = here + r * 16 + k
            tl.store(rest, tl.load(rest) - shift)
            # Nothing reads this row of ``base`` again: it holds the shift for later chunks.
            tl.store(base + (chunk + i) * 16 + k, shift)
            coupling = tl.load(outputs + r * rows + first + near, mask=inside, other=0.0)
            tile -= coupling[:, None] * shift[None, :]
        tl.debug_barrier()  # other threads of the program read the shifts
    tl.store(gains + weight, tl.load(gains + weight) + total.to(tl.float64))


class Chains:
    """Weights of one shape while they are being improved.

    Args:
        count: how many; :meth:`start` is called for each.

    Attributes:
        losses: what ``trace(G D H D^T)`` of each is now, float64 ``[count]``, in units of the
            squared global scale.
    """

    def __init__(self, count: int, rows: int, columns: int, device: torch.device) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(count, *shape, dtype=dtype, device=device)

        self._values = new(rows, columns)
        self._bits = new(rows, columns // BLOCK, dtype=torch.uint8)
        # Of each row by itself, as in ``TwoSided``: its error times the Hessian of the inputs.
        self._residual = new(rows, columns)
        self._hessian = new(columns, columns)
        self._outputs = new(rows, rows)
        self._blocks = tuple(new(columns // BLOCK, BLOCK, BLOCK) for _ in range(3))
        self.losses = new(dtype=torch.float64)

    def start(
        self,
        number: int,
        target: torch.Tensor,
        hessian: torch.Tensor,
        output_hessian: torch.Tensor,
        codes: torch.Tensor,
        block_scale: torch.Tensor,
    ) -> None:
        """Give a weight to the chain ``number``: the arguments of ``two_sided.TwoSided``, with an
        ``output_hessian`` that is ``normed``."""
        # What imports this file is the method itself.
        from quantize.nvfp4.rounding.two_sided import blocks_of

        values = values_of(codes) * block_scale.float().repeat_interleave(BLOCK, 1)
        with on(target.device):
            residual = (target - values) @ hessian
            product = output_hessian @ residual
        self.losses[number] = (product * (target - values)).sum(dtype=torch.float64)
        self._values[number] = values
        self._bits[number] = block_scale.view(torch.uint8)
        self._residual[number] = residual
        self._hessian[number] = hessian
        self._outputs[number] = output_hessian
        for whole, part in zip(self._blocks, blocks_of(hessian.contiguous()), strict=True):
            whole[number] = part

    def sweep(self) -> torch.Tensor:
        """Improve every block of every row once; return by how much each weight's loss fell,
        float64 ``[n]``."""
        count, rows, columns = self._values.shape
        device = self._values.device
        gains = torch.zeros(count, dtype=torch.float64, device=device)
        changes = torch.empty(count, rows, PANEL, device=device)
        with on(device):
            for first in range(0, columns, PANEL):
                end = min(first + PANEL, columns)
                for at in range(first, end, BLOCK):
                    here = torch.baddbmm(
                        self._residual[:, :, at : at + BLOCK],
                        changes[:, :, : at - first],
                        self._hessian[:, first:at, at : at + BLOCK],
                        alpha=-1,
                    )
                    self._block(at // BLOCK, here, changes, gains)
                self._residual.baddbmm_(
                    changes[:, :, : end - first], self._hessian[:, first:end], alpha=-1
                )
        self.losses -= gains
        return gains

    def _block(
        self, block: int, here: torch.Tensor, changes: torch.Tensor, gains: torch.Tensor
    ) -> None:
        count, rows, columns = self._values.shape
        for first in range(0, rows, _ROWS):
            base = self._outputs[:, first : first + _ROWS] @ here
            _rows[(count,)](
                base, self._outputs, here, self._values, self._bits, changes, *self._blocks, gains,
                rows, columns, first, base.shape[1], block,
                PANEL=PANEL, CHUNK=CHUNK, LOWEST=LOWEST, HIGHEST=HIGHEST, PASSES=_PASSES,
                num_warps=1,
            )  # fmt: skip

    def results(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield of each weight codes, uint8 ``[out, in]``, one code a byte, and block scales."""
        for values, bits in zip(self._values, self._bits, strict=True):
            block_scale = bits.view(torch.float8_e4m3fn).clone()
            steps = block_scale.float().repeat_interleave(BLOCK, 1)
            yield codes_of(values / steps), block_scale
