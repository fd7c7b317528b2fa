"""How large the blocks of a product's inputs are: a histogram of their largest magnitudes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quantize.nvfp4.format import BLOCK

_SHIFT = 20
"""Bits of a float32 that one bin has in common: sign, exponent and three bits of the mantissa stay,
so that a bin is as wide as one step of E4M3, an eighth of its octave's least number."""
_BINS = 1 << (31 - _SHIFT)


class Magnitudes:
    """The largest magnitudes of blocks of 16 inputs, counted.

    Bins are read off the numbers' bits, so that every device counts alike.

    Attributes:
        largest: of all inputs; 0 if there were none, NaN if one was.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self._counts = torch.zeros(_BINS, dtype=torch.int64)

    def add(self, x: torch.Tensor) -> None:
        """Count inputs ``[n, in]``, on any device. A last block may be shorter."""
        if not x.numel():
            return
        short = -x.shape[-1] % BLOCK
        blocks = torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, BLOCK))
        largest = blocks.abs().amax(-1).float().flatten()
        bins = largest.view(torch.int32).clamp(min=0) >> _SHIFT  # some NaNs have a sign
        self._counts += torch.bincount(bins, minlength=_BINS).cpu()
        # Not the built-in max, which would lose a NaN.
        self.largest = float(torch.maximum(largest.amax().cpu(), torch.tensor(self.largest)))

    def percentile(self, percent: float, above: float = 0.0) -> float:
        """The magnitude below which so many per cent of the blocks are, as the middle of its bin.

        Args:
            percent: above 0, at most 100.
            above: blocks in bins below that of this magnitude do not count, nor do those of zeros.

        Returns:
            0 if there are no such blocks.
        """
        counts = self._counts.clone()
        counts[: max(1, int(torch.tensor(above).view(torch.int32)) >> _SHIFT)] = 0
        total = counts.cumsum(0)
        if not int(total[-1]):
            return 0.0
        target = percent / 100 * int(total[-1])
        found = int(torch.searchsorted(total.double(), target))
        middle = torch.tensor((found << _SHIFT) + (1 << (_SHIFT - 1)), dtype=torch.int32)
        return float(middle.view(torch.float32))

    @classmethod
    def of_all(cls, several: Iterable[Magnitudes]) -> Magnitudes:
        """Those of all products together."""
        found = cls()
        for one in several:
            found._counts += one._counts
            found.largest = max(found.largest, one.largest)
        return found
