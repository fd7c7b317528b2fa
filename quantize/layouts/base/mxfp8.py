"""MXFP8: E4M3 codes, and one scale, a power of two, for each 32 inputs of a row.

The scale is the least power of two with which the block's largest weight is at most 448, so that
nothing is clipped ("Recipes for Pre-training LLMs with MXFP8", arXiv 2506.08027, against OCP MX
1.0's rounding down). It is stored as E8M0 in a uint8: ``2 ** (byte - 127)``. Sources: ModelOpt's
``MXFP8``, compressed-tensors' preset ``MXFP8``, and vLLM 0.32's readers of both (``KMxfp8Static``,
``CompressedTensorsW8A8Mxfp8``). Kernels quantize activations to MXFP8 too.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from quantize.checkpoint.sources.mxfp8 import BLOCK, decode
from quantize.layouts.base.base_format import LARGEST, SCALE

_BIAS = 127


class MxFp8:
    """See ``quantize.layouts.base.base_format.BaseFormat``."""

    name = "mxfp8"
    modelopt: ClassVar[dict[str, Any]] = {"quant_algo": "MXFP8", "group_size": BLOCK}
    preset = "MXFP8"
    format = "mxfp8-quantized"
    scale_dtype = torch.uint8
    bits = 8 + 8 / BLOCK

    def fits(self, rows: int, columns: int) -> bool:
        return columns % BLOCK == 0

    def scale_name(self, layout: str, expert: bool) -> str:
        return SCALE

    def scale_shape(self, rows: int, columns: int, layout: str, expert: bool) -> tuple[int, ...]:
        return rows, columns // BLOCK

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = weight.float().unflatten(-1, (-1, BLOCK))
        # x = m * 2 ** e with 0.5 <= m < 1, and 448 = 0.875 * 2 ** 9: exact, unlike a logarithm.
        mantissa, exponent = torch.frexp(blocks.abs().amax(-1))
        exponent = (exponent - 9 + (mantissa > 0.875)).clamp_(-_BIAS, 254 - _BIAS)
        codes = torch.ldexp(blocks, -exponent.unsqueeze(-1)).clamp_(-LARGEST, LARGEST)
        return (
            codes.flatten(-2).to(torch.float8_e4m3fn),
            (exponent + _BIAS).to(torch.uint8),
        )

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return decode(codes, scale)

    def round_inputs(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(*self.encode(x)).to(x.dtype)


MXFP8 = MxFp8()
