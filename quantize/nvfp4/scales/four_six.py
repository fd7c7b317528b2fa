"""``four-six``: each block's largest value maps to 6 or to 4, whichever loses less.

Between 4 and 6 E2M1 has no value: where several of a block's weights are nearly as large as its
largest, mapping that one to 4 rounds them better. Source: four-over-six (arXiv 2512.02010). Its
candidates are two of the ``mse`` rule's, which is therefore never worse.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import BLOCK, E2M1_MAX, dequantize, encode, round_to_e4m3
from quantize.nvfp4.scales.rule import ScaleRule


def four_six_scale(weight: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """E4M3 ``[out, in / 16]``: ``amax / 6`` or ``amax / 4`` over the global scale, rounded."""
    amax = weight.unflatten(-1, (-1, BLOCK)).abs().amax(-1).float()
    scales, errors = [], []
    for target in (E2M1_MAX, 4.0):
        scale = round_to_e4m3(amax / (target * global_scale))
        restored = dequantize(encode(weight, scale, global_scale), scale, global_scale)
        difference = (restored - weight.float()) / global_scale  # squares stay within float32
        scales.append(scale)
        errors.append(difference.square().unflatten(-1, (-1, BLOCK)).sum(-1))
    better = errors[1] < errors[0]
    return torch.where(better, scales[1].float(), scales[0].float()).to(torch.float8_e4m3fn)


FOUR_SIX = ScaleRule(four_six_scale)
