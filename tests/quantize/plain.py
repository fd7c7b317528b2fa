"""Quantizing weights without calibration: with a scale rule and the reference kernel."""

from __future__ import annotations

import torch

from quantize.nvfp4.format import NvFp4
from quantize.nvfp4.kernels.kernel import quantize_weights
from quantize.nvfp4.kernels.reference import ReferenceKernel


def plainly(weights: list[torch.Tensor], rule: str = "max", rows: int = 4096) -> list[NvFp4]:
    """Quantize ``weights``, each ``[out, in]``, with one global scale that they share.

    Args:
        rule: a key of ``quantize.nvfp4.scales.RULES``.
        rows: the number of rows that the kernel quantizes at a time.
    """
    return [result.weight for result in quantize_weights(weights, rule, ReferenceKernel(rows))]
