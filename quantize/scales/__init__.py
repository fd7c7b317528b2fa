"""Rules that choose block scales. A new rule is one file here and one line in ``RULES``.

A rule is a function ``(weight, global_scale) -> block_scale``: float ``[out, in]`` and a float32
scalar in, float8_e4m3fn ``[out, in / 16]`` out, positive and finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantize import nvfp4
from quantize.scales.four_six import four_six_scale
from quantize.scales.max import max_scale
from quantize.scales.mse import mse_scale

ScaleRule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

RULES: dict[str, ScaleRule] = {
    "max": max_scale,
    "four-six": four_six_scale,
    "mse": mse_scale,
}


def quantize_weights(
    weights: list[torch.Tensor], rule: str = "max", rows: int = 4096
) -> list[nvfp4.NvFp4]:
    """Quantize ``weights`` (each ``[out, in]``) with one global scale that they share.

    Args:
        weights: one expert's gate and up, or its down alone; any float dtype.
        rule: a key of ``RULES``.
        rows: rows in work at a time, so that float32 temporaries stay small beside the weight.
    """
    choose = RULES[rule]
    shared = nvfp4.global_scale(*weights)
    results = []
    for weight in weights:
        codes, scales = [], []
        for part in weight.split(rows):
            block_scale = choose(part, shared)
            scales.append(block_scale)
            codes.append(nvfp4.encode(part, block_scale, shared))
        results.append(nvfp4.NvFp4(torch.cat(codes), torch.cat(scales), shared))
    return results
