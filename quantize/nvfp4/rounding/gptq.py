"""GPTQ (arXiv 2210.17323) on NVFP4's blocks.

GPTQ rounds one column after another. The columns that follow make up for what a column loses, as
far as their inputs are correlated with its inputs. The scale of a block is chosen when the turn of
its first column comes: from the weights as they are by then, with each column's error weighted by
what later columns cannot make up for.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import BLOCK, pack
from quantize.nvfp4.rounding.blocks import best_scale, codes_of, values_of
from quantize.nvfp4.rounding.method import Method

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to its diagonal: a few tokens say little about
the directions in which they are small."""

_COLUMNS_AT_ONCE = 8 * BLOCK
"""After so many columns, one matrix product passes on what they lost to all columns that follow."""


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    global_scale: torch.Tensor,
    output_hessian: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``quantize.nvfp4.rounding.method.Round``; ``output_hessian`` makes no difference."""
    left = weight.float() / global_scale
    factor = compensation(hessian)
    if left.is_cuda:
        from quantize.nvfp4.rounding.kernels import gptq as on_gpu

        codes, block_scale = on_gpu.round_columns(left, factor)
    else:
        codes, block_scale = round_columns(left, factor)
    return pack(codes), block_scale


def round_columns(left: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round one column after another.

    Args:
        left: float32 ``[out, in]``: the weight in units of the global scale; overwritten.
        factor: float32 ``[in, in]``, of :func:`compensation`.

    Returns:
        uint8 codes, one a byte, ``[out, in]``, and block scales, float8_e4m3fn ``[out, in / 16]``.
    """
    columns = left.shape[1]
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    scales = torch.empty(len(left), columns // BLOCK, device=left.device)
    for first in range(0, columns, _COLUMNS_AT_ONCE):
        end = min(first + _COLUMNS_AT_ONCE, columns)
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
    return codes, scales.to(torch.float8_e4m3fn)


def compensation(hessian: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, float32 ``[in, in]``.

    Row ``j``, divided by its element on the diagonal, says how much each later column must change
    to make up for one unit of error in column ``j``.
    """
    # With both orders turned round, an upper factor is a lower one: no inverse of the Hessian need
    # be made, which takes most of the time, and factored.
    turned = torch.linalg.cholesky(damped(hessian, DAMPING).double().flip(0, 1))
    identity = torch.eye(len(turned), dtype=turned.dtype, device=turned.device)
    return torch.linalg.solve_triangular(turned, identity, upper=False).flip(0, 1).float()


def inverse_and_factor(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inverse of positive definite matrices ``[..., n, n]`` and the inverse's upper
    Cholesky factor, both in float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix.double()))
    return inverse, torch.linalg.cholesky(inverse, upper=True)


def damped(hessian: torch.Tensor, share: float) -> torch.Tensor:
    """Return a positive definite copy: add ``share`` of the diagonal's mean to the diagonal."""
    result = hessian.clone()
    diagonal = result.diagonal()
    # Without any input, every weight is as important as every other.
    diagonal += torch.where(diagonal.mean() > 0, share * diagonal.mean(), 1.0)
    return result


GPTQ = Method(gptq)
