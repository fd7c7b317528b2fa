"""``max``: each block's largest value maps to 6, the largest value of E2M1, as nearly as E4M3 can.

Where E4M3 rounds the block scale down, which is about every other time, the largest value is above
6 steps, at most 6.375, and becomes 6.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import BLOCK, E2M1_MAX, round_to_e4m3
from quantize.nvfp4.scales.rule import Reach, ScaleRule


def max_scale(weight: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Block scales, float8_e4m3fn ``[out, in / 16]``: ``amax / 6 / global_scale``, to nearest."""
    amax = weight.unflatten(-1, (-1, BLOCK)).abs().amax(-1).float()
    return round_to_e4m3(amax / (E2M1_MAX * global_scale))


MAX = ScaleRule(max_scale, reach=Reach())
