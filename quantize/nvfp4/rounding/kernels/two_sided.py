"""The two-sided descent of many weights side by side: one program is one weight's chain of steps.

With a Hessian of the outputs, rows depend on each other, so a weight's steps come one after another
however many processors there are. But weights do not depend on each other, so a GPU goes through as
many as fit into its memory.

``two_sided`` takes all blocks of a row before the next row. Here a launch takes 128 columns of 32
rows in that order, then come the rows' next 128 columns, and after them the next 32 rows. All are
exact block-coordinate descent, in which no step raises the loss. But the order counts for how many
sweeps it takes: one block of all rows, then the next block, would leave a tenth more of the loss
(``docs/contributors/rounding-on-gpus.md``).

A step tries eight candidates at once, as the columns of a tile ``[16, 8]``: the present codes at
the present scale, and seven neighbouring scales, each first rounded as GPTQ does.
"""

from __future__ import annotations

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

ROWS = 32
"""So many rows has a launch."""
WARPS = 1
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
        by how much the block's error falls (0: nothing better), the new values, and the scale's
        bits.
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
            # Any code will do here, so a division that is not quite exact will: it is a fourth of
            # the instructions.
            value = unit_of((old - slope / own) * once)
            change = value * scale - old
            better = alive & (change * (2.0 * slope + own * change) < least)
            change = tl.where(better, change, 0.0)
            trial = tl.where((k[:, None] == j) & better[None, :], (value * scale)[None, :], trial)
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
    scale_bits = tl.sum(tl.where(candidate == which, bits, 0), 0)
    values = tl.where(gain > 0, chosen, found)
    return gain, values, tl.where(gain > 0, scale_bits, now)


@triton.jit
def _panel(  # type: ignore[no-untyped-def]
    both, outputs, hessian, values, bits, changes, inner, inverse, feedback, gains,
    rows, columns, first_row, count, first, blocks,
    PANEL: tl.constexpr, ROWS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    PASSES: tl.constexpr,
):  # fmt: skip
    """Improve a panel of some rows of each weight, one block after another.

    All arguments have the weights in their first dimension.

    Args:
        both: float32 ``[2 * ROWS, columns]``. Its second half has these rows of ``outputs @
            residual``, and those of its columns that are the panel's are overwritten.
        outputs: float32 ``[rows, rows]``, and hessian: float32 ``[columns, columns]``: the Hessians
            of outputs and of inputs.
        values: float32 ``[rows, columns]``; bits: uint8 ``[rows, columns / 16]``, E4M3 bits; both
            improved in place.
        changes: float32 ``[ROWS, PANEL]``: becomes how the values of the panel change.
        inner, inverse, feedback: float32 ``[columns / 16, 16, 16]``, see ``two_sided.blocks_of``.
        gains: float64 scalars, to which the falls of the losses are added.
        first_row, count: the first row, and how many; first, blocks: the panel's first column, and
            how many blocks it has.
    """
    weight = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, 16)
    wide = tl.arange(0, PANEL)
    within = wide < blocks * 16
    base = both + (weight * 2 + 1) * ROWS * columns + first
    outputs += weight * rows * rows
    hessian += weight * columns * columns
    values += weight * rows * columns
    bits += weight * rows * (columns // 16)
    changes += weight * ROWS * PANEL
    inner += weight * columns * 16
    inverse += weight * columns * 16
    feedback += weight * columns * 16
    total = 0.0
    for i in range(count):
        row = (first_row + i + tl.program_id(0) * 0).to(tl.int64)
        own = tl.load(outputs + row * (rows + 1))
        mine = base + i * columns
        changed = 0.0
        start = tl.load(mine + wide, mask=within, other=0.0)
        for block in range(blocks):
            at = first + 16 * block
            left = tl.load(mine + 16 * block + k)
            left = tl.math.div_rn(left, tl.zeros([16], tl.float32) + own)
            value = values + row * columns + at + k
            scale = bits + row * (columns // 16) + at // 16
            found = tl.load(value)
            gain, new, chosen = _improve(
                left, found, tl.load(scale).to(tl.int32),
                inner + at * 16, inverse + at * 16, feedback + at * 16, LOWEST, HIGHEST, PASSES,
            )  # fmt: skip
            tl.store(changes + i * PANEL + 16 * block + k, new - found)
            if gain > 0:
                changed += gain
                tl.store(value, new)
                tl.store(scale, chosen.to(tl.uint8))
                # The row's other blocks make up for what this one has changed.
                across = tl.load(
                    hessian + (at + k).to(tl.int64)[:, None] * columns + first + wide[None, :],
                    mask=within[None, :], other=0.0,
                )  # fmt: skip
                passed = tl.sum(across * (new - found)[:, None], 0)
                now = tl.load(mine + wide, mask=within, other=0.0)
                tl.debug_barrier()  # other threads have read it
                tl.store(mine + wide, now - own * passed, mask=within)
                tl.debug_barrier()  # other threads read it
        if changed > 0:
            total += changed * own
            shift = (start - tl.load(mine + wide, mask=within, other=0.0)) / own
            for later in range((i + 1) // 8 * 8, count, 8):
                which = later + tl.arange(0, 8)
                inside = (which < count) & (which > i)
                coupling = tl.load(outputs + row * rows + first_row + which, mask=inside, other=0.0)
                place = base + which[:, None] * columns + wide[None, :]
                mask = inside[:, None] & within[None, :]
                then = tl.load(place, mask=mask, other=0.0)
                tl.store(place, then - coupling[:, None] * shift[None, :], mask=mask)
            tl.debug_barrier()  # other threads read them
    tl.store(gains + weight, tl.load(gains + weight) + tl.cast(total, tl.float64))


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
        blocks: tuple[torch.Tensor, ...],
    ) -> None:
        """Give a weight to the chain ``number``.

        Args:
            target, hessian, output_hessian, codes, block_scale: as ``two_sided.TwoSided`` has them,
                but the mean of ``output_hessian``'s diagonal is 1.
            blocks: what ``two_sided.blocks_of`` makes of ``hessian``.
        """
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
        for whole, part in zip(self._blocks, blocks, strict=True):
            whole[number] = part

    def sweep(self) -> torch.Tensor:
        """Improve every block of every row once; return by how much each weight's loss fell,
        float64 ``[n]``."""
        count, rows, columns = self._values.shape
        device = self._values.device
        gains = torch.zeros(count, dtype=torch.float64, device=device)
        # The rows' residuals and their rows of ``outputs @ residual``: both change by products with
        # the same columns of the Hessian, so one product reads those once.
        both = torch.zeros(count, 2 * ROWS, columns, device=device)
        changes = torch.zeros(count, 2 * ROWS, PANEL, device=device)
        with on(device):
            for first in range(0, rows, ROWS):
                part = slice(first, min(first + ROWS, rows))
                size = part.stop - first
                both[:, :size] = self._residual[:, part]
                torch.bmm(self._outputs[:, part], self._residual, out=both[:, ROWS : ROWS + size])
                self._rows(part, both, changes, gains)
                self._residual[:, part] = both[:, :size]
        self.losses -= gains
        return gains

    def _rows(
        self, part: slice, both: torch.Tensor, changes: torch.Tensor, gains: torch.Tensor
    ) -> None:
        """Improve some rows of each weight."""
        count, rows, columns = self._values.shape
        size = part.stop - part.start
        coupling = self._outputs[:, part, part]
        own = torch.empty(count, ROWS, PANEL, device=both.device)
        for first in range(0, columns, PANEL):
            end = min(first + PANEL, columns)
            _panel[(count,)](
                both, self._outputs, self._hessian, self._values, self._bits, own, *self._blocks,
                gains, rows, columns, part.start, size, first, (end - first) // BLOCK,
                PANEL=PANEL, ROWS=ROWS, LOWEST=LOWEST, HIGHEST=HIGHEST, PASSES=_PASSES,
                num_warps=WARPS,
            )  # fmt: skip
            changes[:, :size] = own[:, :size]
            torch.bmm(coupling, own[:, :size], out=changes[:, ROWS : ROWS + size])
            both.baddbmm_(
                changes[:, :, : end - first], self._hessian[:, first:end], beta=1, alpha=-1
            )

    def result(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a weight's codes, uint8 ``[out, in]``, one code a byte, and block scales."""
        block_scale = self._bits[number].view(torch.float8_e4m3fn).clone()
        steps = block_scale.float().repeat_interleave(BLOCK, 1)
        return codes_of(self._values[number] / steps), block_scale
