"""``mse``: for each block, the E4M3 scale with the least squared error of all 126.

A smaller scale than the ``max`` rule's clips the block's largest values but resolves the others
better. A larger one may put the values nearer to the uneven grid of E2M1. Only a few scales can be
the best, so no more need be tried. Let ``a`` be the block's largest magnitude, and ``s`` a scale.

* **At least a / 7.9375.** In units of ``s``, the grid of ``2 s`` is 0, 1, 2, 3, 4, 6, 8, 12. Up to
  2 it is the coarser one: each of the 15 other values may lose 0.25 by it. From there to 7 both
  round alike. From 7 on it is the finer one, and wins (a - 6)^2 - (a - 8)^2 = 4 a - 28 (beyond 10,
  more). That is over 15 * 0.25 if ``a`` is above 7.9375. Where ``2 s`` is above 448, other scales
  do the same.
* **Less than a / 3.5.** If ``a`` is no more than 3.5 units of ``s``, all values are rounded to 0,
  0.5, 1, 1.5, 2 or 3 of them. The grid of ``s / 2`` has these and more. ``s / 2`` is an E4M3
  number, unless ``s`` is an odd multiple of E4M3's smallest, 2^-9. Those have bits 1 to 15, and are
  tried where blocks are so small.

``max`` rounds ``a / 6``, so this is from 4 below its scale to 7 above, in bits. The test
``test_no_other_scale_can_be_better`` has the proof in integers. That the scales which can be best
are bounded is from ScaleSweep (arXiv 2606.07618), which has bounds for each block; these are the
same for all, so that kernels try the same number everywhere.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import BLOCK, E2M1_VALUES, round_to_e2m1
from quantize.nvfp4.scales.max import max_scale
from quantize.nvfp4.scales.rule import Reach, ScaleRule

LOWEST, HIGHEST = 1, 126
"""Bits of E4M3's smallest and largest positive finite values."""
REACH = Reach(below=4, above=7, least=15)


def mse_scale(weight: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Block scales, float8_e4m3fn ``[out, in / 16]``, with the least squared error in each block.

    The error is ``sum((weight - dequantized) ** 2)``. It is computed in units of the global scale,
    so that squares fit into float32 for all weights. The order of operations is part of the rule,
    since faster kernels must give the same bits. The weight is divided by the global scale,
    multiplied by the candidate's reciprocal, and rounded. Squares are summed from the block's first
    weight to its last.
    """
    blocks = weight.float().unflatten(-1, (-1, BLOCK)).abs() / global_scale
    start = max_scale(weight, global_scale).view(torch.uint8).to(torch.int16)
    highest = (start + REACH.above).clamp(REACH.least, HIGHEST)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=weight.device)

    best = torch.full(start.shape, torch.inf, dtype=torch.float32, device=weight.device)
    chosen = start.clone()
    last = int((highest - start).amax())
    for offset in (0, *range(-REACH.below, 0), *range(1, last + 1)):
        bits = torch.minimum(start + offset, highest).clamp_min(LOWEST)
        scale = bits.to(torch.uint8).view(torch.float8_e4m3fn).float().unsqueeze(-1)
        nearest = values[round_to_e2m1(blocks * scale.reciprocal()).int()] * scale
        squares = (blocks - nearest).square()
        error = squares[..., 0]
        for k in range(1, BLOCK):
            error = error + squares[..., k]
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, bits, chosen)
    return chosen.to(torch.uint8).view(torch.float8_e4m3fn)


MSE = ScaleRule(mse_scale, reach=REACH)
