"""GPTQ (arXiv 2210.17323) on NVFP4's blocks.

Columns are rounded one after another, and what each loses is made up for by those after it, as far
as their inputs are correlated. A block's scale is chosen when its first column's turn comes: from
the weights as they are then, by errors weighted with what later columns cannot make up for.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import BLOCK, pack
from quantize.nvfp4.rounding.blocks import best_scale, codes_of, values_of
from quantize.nvfp4.rounding.method import Method

DAMPING = 0.01
"""Of the mean second moment, added to all: few tokens say little about small directions."""

_TOGETHER = 8 * BLOCK
"""Columns after which what they lost is passed on to all others at once."""


def gptq(
    weight: torch.Tensor,
    moment: torch.Tensor,
    global_scale: torch.Tensor,
    output: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``quantize.nvfp4.rounding``; ``output`` makes no difference."""
    left = weight.float() / global_scale
    factor = compensation(moment)
    columns = left.shape[1]
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    scales = torch.empty(len(left), columns // BLOCK, device=left.device)
    for first in range(0, columns, _TOGETHER):
        end = min(first + _TOGETHER, columns)
        lost = torch.empty(len(left), end - first, device=left.device)
        for column in range(first, end):
            if column % BLOCK == 0:
                block = slice(column, column + BLOCK)
                scale = best_scale(left[:, block], factor.diagonal()[block].square().reciprocal())
                scales[:, column // BLOCK] = scale
            now = left[:, column]
            codes[:, column] = codes_of(now / scale)
            share = (now - values_of(codes[:, column]) * scale) / factor[column, column]
            lost[:, column - first] = share
            left[:, column + 1 : end] -= torch.outer(share, factor[column, column + 1 : end])
        left[:, end:] -= lost @ factor[first:end, end:]
    return pack(codes), scales.to(torch.float8_e4m3fn)


def compensation(moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped moments' inverse, float32 ``[in, in]``: row ``j``
    over its diagonal is what a unit of column ``j``'s error is worth in the columns after it."""
    return inverse_and_factor(damped(moment, DAMPING))[1].float()


def inverse_and_factor(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of positive definite moments ``[..., n, n]``, and its upper Cholesky factor, both
    float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment.double()))
    return inverse, torch.linalg.cholesky(inverse, upper=True)


def damped(moment: torch.Tensor, share: float) -> torch.Tensor:
    """A positive definite copy: ``share`` of the mean of the diagonal is added to it."""
    result = moment.clone()
    diagonal = result.diagonal()
    # Without any input, every weight is as important as every other.
    diagonal += torch.where(diagonal.mean() > 0, share * diagonal.mean(), 1.0)
    return result


GPTQ = Method(gptq)
