"""``power-of-two``: all scales are powers of two, so that weights from MXFP4 come out exactly.

MXFP4 has E2M1 values, too, with a power of two for each 32. NVFP4 holds the same numbers if its
scales are powers of two as well: 6 of a block's largest value must be reached, and no more. E4M3
has 2^-9 to 2^8 of them, so blocks may differ by 2^17 in a weight; smaller ones are rounded. For
weights that have not been in MXFP4, this is the coarsest of the rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantize.nvfp4.format import BLOCK, E2M1_MAX, round_to_e4m3
from quantize.nvfp4.scales.rule import ScaleRule

_LARGEST = 256.0
"""The largest power of two in E4M3."""


def _covering(amax: torch.Tensor) -> torch.Tensor:
    """The smallest powers of two, float32, of which six are no less than ``amax``; 1 for zero."""
    mantissa, exponent = torch.frexp(amax / torch.tensor(E2M1_MAX, device=amax.device))
    exponent = exponent - (mantissa == 0.5).int()
    exact = torch.ldexp(torch.ones_like(amax), exponent)
    return torch.where(amax == 0, torch.ones_like(amax), exact)


def power_of_two_scale(weight: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Block scales, float8_e4m3fn ``[out, in / 16]``: powers of two, if ``global_scale`` is one."""
    amax = weight.unflatten(-1, (-1, BLOCK)).abs().amax(-1).float()
    return round_to_e4m3(_covering(amax) / global_scale)


def power_of_two_global_scale(amax: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The power of two by which the largest block scale becomes 256."""
    scale = _covering(amax.float()) / _LARGEST
    # As in quantize.nvfp4.format.global_scale_of; this is a power of two.
    return torch.where(
        amax == 0, torch.ones_like(scale), scale.clamp_min(torch.finfo(torch.float32).tiny)
    )


POWER_OF_TWO = ScaleRule(power_of_two_scale, global_scale=power_of_two_global_scale)
