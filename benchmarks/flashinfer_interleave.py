"""FlashInfer's layout of packed E2M1 weights for FP8 on ``sm_90``, in PyTorch.

FlashInfer makes it by a CUDA kernel (``interleave_fp4_fp8_weights_for_sm90_mixed_gemm_kernel``,
``moe_gemm_mixed_utils.cu``) that it compiles together with all its CUTLASS experts, which takes
many minutes and its whole source. This is the same bytes by permutations.
"""

from __future__ import annotations

import torch

SIGNS = ((3, 7), (7, 15), (11, 23), (15, 31), (19, 3), (23, 11), (27, 19), (31, 27))
"""Which bit each sign of eight codes comes from, and goes to."""


def interleave(weight: torch.Tensor, quant_type: str = "fp4_fp8") -> torch.Tensor:
    """The packed codes in the order of the tensor cores' fragments, signs where FP8 has them.

    Args:
        weight: uint8 ``[experts, rows, columns / 2]``, the lower code in the lower four bits; rows
            are a multiple of 16, columns of 64.
        quant_type: ``fp4_fp8``, as FlashInfer's function is called.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: for another ``quant_type``, or other sizes.
    """
    if quant_type != "fp4_fp8":
        raise ValueError(f"quant_type {quant_type!r}: only fp4_fp8 is written here")
    experts, rows, half = weight.shape
    if rows % 16 or half % 32:
        raise ValueError(f"{rows} x {2 * half}: rows must be a multiple of 16, columns of 64")
    words = weight.contiguous().view(torch.int16).int() & 0xFFFF
    # Row 16 i + 8 h + r; 16 words of a partition p: 8 m + 4 q + t.
    split = words.view(experts, rows // 16, 2, 8, half // 32, 2, 2, 4)
    low, high = split.unbind(2)
    eight = low.long() | high.long() << 16
    moved = eight & 0x77777777
    for source, target in SIGNS:
        moved |= (eight >> source & 1) << target
    pairs = torch.stack((moved & 0xFFFF, moved >> 16), dim=-1)  # e i r p m q t h
    ordered = pairs.permute(0, 1, 5, 2, 3, 4, 6, 7).reshape(experts, rows, half // 2)
    signed = torch.where(ordered > 0x7FFF, ordered - 0x10000, ordered)
    return signed.to(torch.int16).view(torch.uint8)
