"""Weights quantized plainly: by a scale rule and the reference kernel."""

from __future__ import annotations

import torch

from quantize.nvfp4.format import NvFp4
from quantize.nvfp4.kernels.kernel import quantize_weights
from quantize.nvfp4.kernels.reference import ReferenceKernel


def plainly(weights: list[torch.Tensor], rule: str = "max", rows: int = 4096) -> list[NvFp4]:
    """``weights`` (each ``[out, in]``) with one global scale that they share.

    Args:
        rows: worked on at a time.
    """
    return [result.weight for result in quantize_weights(weights, rule, ReferenceKernel(rows))]
