"""ModelOpt's two NVFP4 kernels in plain PyTorch, so that its recipes run where there is no GPU.

All of a recipe but these is ModelOpt's own code: quantizers, calibration, searches. On m3-nano the
four recipes come out in the order they have on an H200, each within 5 % of its KL there, though on
another Python's library; bit for bit the kernels were not compared. For ModelOpt 0.47, whose
``modelopt/torch/quantization/tensor_quant.py`` names them; their arithmetic is that of
``modelopt/torch/kernels/quantization/gemm/fp4_kernel.py``.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from quantize.nvfp4.activations import round_nvfp4
from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX, decode, pack, round_to_e2m1


def install() -> None:
    """Put them where ModelOpt calls its own, for the rest of the process."""
    from modelopt.torch.quantization import tensor_quant

    tensor_quant.dynamic_block_quantize_op = dynamic
    tensor_quant.triton_kernel = SimpleNamespace(
        IS_AVAILABLE=True, static_blockwise_fp4_fake_quant=static
    )


def dynamic(
    x: torch.Tensor, block_size: int, amax: torch.Tensor | None, *formats: int
) -> torch.Tensor:
    """``x`` ``[..., n]``: block scales from its own values, relative to ``amax`` of the whole."""
    if block_size != 16 or formats != (4, 2, 8, 4):  # E2M1 (bits, exponent), E4M3
        raise NotImplementedError(f"blocks of {block_size}, formats {formats}")
    largest = (x if amax is None else amax).abs().amax().float()
    return round_nvfp4(x.flatten(0, -2), largest / (E2M1_MAX * E4M3_MAX)).view_as(x)


def static(
    x: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = E4M3_MAX,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``x``, whose blocks on end have the largest magnitudes ``amax``, any shapes."""
    scale = amax.float().reshape(-1, 1) / E2M1_MAX
    if quantize_block_scales:
        largest = (amax if global_amax is None else global_amax).amax().float()
        step = largest / (E2M1_MAX * fp8_max_for_normalization)
        scale = (scale / step).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * step
    blocks = x.float().reshape(len(scale), -1) / torch.where(scale == 0, torch.inf, scale)
    return (decode(pack(round_to_e2m1(blocks))) * scale).view(x.shape).to(out_dtype or x.dtype)
