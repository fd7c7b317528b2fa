"""``mse``: for each block, the E4M3 scale near the ``max`` rule's with the least squared error.

A smaller scale clips the block's largest values but resolves the others better. A larger scale may
put the values nearer to the uneven grid of E2M1. Neighbouring positive E4M3 numbers have
neighbouring bit patterns, so the search adds offsets to the bits of the ``max`` rule's scale. Eight
offsets are a factor of two, so the search reaches from half to twice the ``max`` rule's scale. In
every random block tried, this range held the best of all 126 scales
(``tests/quantize/test_nvfp4.py``).
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import BLOCK, E2M1_VALUES, round_to_e2m1
from quantize.nvfp4.scales.max import max_scale
from quantize.nvfp4.scales.rule import ScaleRule

OFFSETS = (0, *(k for k in range(-8, 9) if k))
"""Offset 0, the ``max`` rule's own scale, comes first, so that it wins ties."""
LOWEST, HIGHEST = 1, 126
"""Bits of E4M3's smallest and largest positive finite values."""


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
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=weight.device)

    best = torch.full(start.shape, torch.inf, dtype=torch.float32, device=weight.device)
    chosen = start.clone()
    for offset in OFFSETS:
        bits = (start + offset).clamp(LOWEST, HIGHEST)
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


MSE = ScaleRule(mse_scale, offsets=OFFSETS)
