"""Activations as low-precision kernels round them, and back: what goes into a matrix product.

Plain PyTorch in float32, on the device of the input.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import BLOCK, E2M1_MAX, E4M3_MAX


def round_nvfp4(
    x: torch.Tensor, input_scale: torch.Tensor, target: float = E2M1_MAX
) -> torch.Tensor:
    """``x`` ``[rows, 16 * n]`` rounded to NVFP4, in its dtype.

    A block's scale is ``amax / 6 / input_scale`` in E4M3, at most 448; values go to the nearest of
    E2M1's, ties to the even code. The order of operations is vLLM's
    (``quantization/utils/nvfp4_emulation_utils.py``: ``ref_nvfp4_quant_dequant``).

    Args:
        input_scale: float32 scalar, or ``[rows]``: what E4M3 block scales are relative to.
        target: what a block's largest becomes, instead of 6.
    """
    inverse = 1.0 / input_scale.reshape(-1, 1, 1)  # what vLLM calls the global scale
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    # Times the rounded sixth, as vLLM: not the same as a division.
    largest = blocks.abs().amax(-1, keepdim=True) * (1 / E2M1_MAX) * (E2M1_MAX / target)
    scale = (inverse * largest).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    scaled = blocks * torch.where(scale == 0, 0.0, 1.0 / (scale * (1.0 / inverse)))
    scaled = scaled.clamp(-E2M1_MAX, E2M1_MAX)
    # E2M1 is evenly spaced by 1/2 to 2, by 1 to 4, by 2 to 6, and even multiples are even codes.
    size = scaled.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    values = torch.round(scaled / step) * step
    return (values * (scale / inverse)).flatten(-2).to(x.dtype)


def row_scales(x: torch.Tensor) -> torch.Tensor:
    """An input scale for each row of ``x`` ``[rows, n]``, float32 ``[rows]``: ``amax / (6 * 448)``.

    So do kernels that are asked for activations with a scale for each token (flashinfer-python
    0.7.2, ``nvfp4_quantize`` with ``per_token_activation``, and vLLM's
    ``NVFP4_PER_TOKEN_BASE_GLOBAL_SCALE``).
    """
    largest = x.float().abs().amax(-1)
    return torch.where(largest == 0, 1.0, largest / (E2M1_MAX * E4M3_MAX))


def round_nvfp4_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[rows, 16 * n]`` rounded to NVFP4 by :func:`row_scales`, in its dtype."""
    return round_nvfp4(x, row_scales(x))


def round_rows_e4m3(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[rows, columns]`` rounded to E4M3 with a scale for each row, in its dtype."""
    largest = x.float().abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / E4M3_MAX)
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
