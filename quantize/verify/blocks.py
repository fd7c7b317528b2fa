"""What each block of a weight lost, and whether rounding within the block's scale can lose that.

Without calibration a result can be made again, and is compared bit by bit. A calibrated rounding
cannot be: it depends on a text. It may also move a value by more than half a step, since columns
make up for what other columns lose, and with ``two-sided`` rows for other rows. So arithmetic alone
gives no bound, and these are set between what roundings do and what damage does. A row, or a block
of 16 inputs, may lose a share of a norm: its own, that of its row's average block, or ``floor`` of
that of the weight's average row or block, whichever is largest.

* ``COLUMNS``, for roundings to nearest, ``gptq`` and ``descent``. In calibrated layers of m3-nano
  and in small random models (2.6 million blocks) they lost at most 0.15 of a row and 0.26 of a
  block; with inputs that are nearly the same up to factors, 0.28 and 0.46.
* ``ROWS``, for ``two-sided``, and where the rounding is not known. It lost at most 0.49 of a row
  and 0.62 of a block, and with inputs and gradients that are nearly the same up to factors 0.9 and
  1.5 of an average one.

What is zeroed loses 1, what has flipped signs 2, and a scale that is off by a factor ``f`` loses
``f - 1``. Whatever they are, a block's values may be off by ``OWN`` of its steps (block scale times
global scale), since of a block much smaller than the smallest scale allows nothing is left.

The tests break the bounds (``tests/quantize/test_verify_bounds.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from quantize.nvfp4.format import BLOCK as SIZE
from quantize.nvfp4.format import NvFp4, decode
from quantize.nvfp4.kernels.numba_cpu import E4M3, exact

OWN = 0.5


class Bounds(NamedTuple):
    """Shares of a norm that may be lost, see the module."""

    row: float
    block: float
    floor: float


COLUMNS = Bounds(0.5, 0.75, 0.1)
ROWS = Bounds(0.95, 1.75, 1.0)

_PAIRS = decode(torch.arange(256, dtype=torch.uint8, device="cpu").unsqueeze(1)).numpy()
"""float32 ``[256, 2]``: both E2M1 values of each packed byte."""


class Blocks(NamedTuple):
    """Squared norms in units of the squared global scale, each float32 ``[out, in / 16]``.

    Attributes:
        noise: of the differences.
        signal: of the weights.
        step: the block scales.
    """

    noise: torch.Tensor
    signal: torch.Tensor
    step: torch.Tensor

    def typical(self) -> torch.Tensor:
        """The squared norm that a block's error is compared with, float32 ``[out, in / 16]``."""
        return torch.maximum(self.signal, self.signal.mean(1, keepdim=True))

    def worst(self) -> tuple[int, int, float]:
        """Row and number of the block that lost most, and how much."""
        ratio = (self.noise / self.typical().clamp_min(1e-30)).sqrt()
        place = int(ratio.argmax())
        row, block = divmod(place, ratio.shape[1])
        return row, block, float(ratio.flatten()[place])

    def problem(self, bounds: Bounds = COLUMNS) -> str | None:
        """What no rounding does; None if there is nothing of that kind."""
        own = SIZE * (OWN * self.step).square()
        lost, whole = self.noise.sum(1), self.signal.sum(1)
        size = torch.maximum(whole, bounds.floor**2 * whole.mean())
        rows = (lost > torch.maximum(bounds.row**2 * size, own.sum(1))).nonzero().flatten()
        if len(rows):
            row = int(rows[0])
            return (
                f"{len(rows)} of {len(lost)} rows are not the source's: of row {row}, "
                f"{(lost[row] / size[row]).sqrt():.2f} of its norm is lost"
            )
        sizes = torch.maximum(self.typical(), bounds.floor**2 * self.signal.mean())
        bad = (self.noise > torch.maximum(bounds.block**2 * sizes, own)).nonzero()
        if len(bad):
            row, block = (int(n) for n in bad[0])
            share = (self.noise[row, block] / sizes[row, block]).sqrt()
            return (
                f"{len(bad)} of {self.noise.numel()} blocks are not the source's: of row {row}, "
                f"{place(block)}, {share:.2f} is lost, more than rounding within its scale can"
            )
        return None


def place(block: int) -> str:
    """The inputs of a block, in words."""
    return f"inputs {SIZE * block} to {SIZE * block + SIZE - 1}"


def compare_blocks(weight: torch.Tensor, stored: NvFp4) -> Blocks:
    """Compare a weight ``[out, in]``, of any float dtype, with its quantized form.

    Both are on the CPU, and the block scales are positive and finite.
    """
    rows, columns = weight.shape
    noise, signal = torch.empty(2, rows, columns // SIZE)
    bits = stored.block_scale.contiguous().view(-1).view(torch.uint8).numpy()
    _block_errors(
        weight.float().contiguous().view(-1).numpy(),
        np.float32(float(stored.global_scale)),
        _PAIRS,
        E4M3,
        stored.codes.contiguous().view(-1).numpy(),
        bits,
        noise.view(-1).numpy(),
        signal.view(-1).numpy(),
    )
    return Blocks(noise, signal, stored.block_scale.float())


@exact
def _block_errors(x, global_scale, pairs, e4m3, packed, scale, noise, signal):  # type: ignore[no-untyped-def]
    """Fill ``noise`` and ``signal``, see ``Blocks``; all arrays are flat."""
    inverse = np.float32(1) / global_scale
    for b in range(scale.shape[0]):
        value = e4m3[scale[b]]
        lost = np.float32(0)
        whole = np.float32(0)
        for j in range(SIZE // 2):
            byte = packed[SIZE // 2 * b + j]
            for k in range(2):
                ours = x[SIZE * b + 2 * j + k] * inverse
                difference = pairs[byte, k] * value - ours
                lost += difference * difference
                whole += ours * ours
        noise[b] = lost
        signal[b] = whole
