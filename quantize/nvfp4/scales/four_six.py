"""``four-six``: each block's largest value maps to 6 or to 4, whichever has the smaller error.

E2M1 has no value between 4 and 6. If several weights of a block are nearly as large as its largest
one, they are rounded better if the largest one maps to 4. Source: four-over-six (arXiv 2512.02010).
Both scales are among those that the ``mse`` rule tries, so ``mse`` is never worse.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import BLOCK, E2M1_MAX, dequantize, encode, round_to_e4m3
from quantize.nvfp4.scales.rule import ScaleRule


def four_six_scale(weight: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Block scales, float8_e4m3fn ``[out, in / 16]``.

    Each is ``amax / 6 / global_scale`` or ``amax / 4 / global_scale``, rounded to nearest, where
    ``amax`` is the block's largest magnitude. The first one wins ties.
    """
    amax = weight.unflatten(-1, (-1, BLOCK)).abs().amax(-1).float()
    scales, errors = [], []
    for target in (E2M1_MAX, 4.0):
        scale = round_to_e4m3(amax / (target * global_scale))
        restored = dequantize(encode(weight, scale, global_scale), scale, global_scale)
        difference = (restored - weight.float()) / global_scale  # so that squares fit into float32
        scales.append(scale)
        errors.append(difference.square().unflatten(-1, (-1, BLOCK)).sum(-1))
    better = errors[1] < errors[0]
    return torch.where(better, scales[1].float(), scales[0].float()).to(torch.float8_e4m3fn)


FOUR_SIX = ScaleRule(four_six_scale)
