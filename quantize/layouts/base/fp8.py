"""FP8 with one float32 scale for each 128 x 128 weights, as DeepSeek-V3 introduced it.

The scale is ``amax / 448`` of its block, and codes are rounded to nearest, ties to even. Sources:
ModelOpt's ``FP8_PB_WO`` (scales ``[out / 128, 1, in / 128, 1]``), compressed-tensors' preset
``FP8_BLOCK`` (``[out / 128, in / 128]``), and vLLM 0.32's readers of both (``KFp8Block128``,
``CompressedTensorsW8A8Fp8``). Kernels quantize activations for each token and 128 inputs. vLLM
reads ModelOpt's experts as DeepSeek's (``Fp8MoEMethod``), so their scales have DeepSeek's name.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from quantize.checkpoint.sources.fp8_block import decode
from quantize.layouts.base.base_format import LARGEST, SCALE
from quantize.nvfp4.activations import round_rows_e4m3

_BLOCK = 128


class Fp8:
    """See ``quantize.layouts.base.base_format.BaseFormat``."""

    name = "fp8"
    modelopt: ClassVar[dict[str, Any]] = {"quant_algo": "FP8_PB_WO", "group_size": _BLOCK}
    preset = "FP8_BLOCK"
    format = "float-quantized"
    scale_dtype = torch.float32
    bits = 8 + 32 / _BLOCK**2

    def fits(self, rows: int, columns: int) -> bool:
        # A joined weight has one grid of blocks, so each part must end where a block does.
        return rows % _BLOCK == 0 and columns % _BLOCK == 0

    def scale_name(self, layout: str, expert: bool) -> str:
        return "weight_scale_inv" if layout == "modelopt" and expert else SCALE

    def scale_shape(self, rows: int, columns: int, layout: str, expert: bool) -> tuple[int, ...]:
        down, across = rows // _BLOCK, columns // _BLOCK
        return (down, 1, across, 1) if layout == "modelopt" and not expert else (down, across)

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = _blocks(weight.float())
        amax = blocks.abs().amax((1, 3))
        scale = amax / LARGEST
        scale = torch.where(scale > 0, scale, 1.0)  # a block of zeros, or nearly
        codes = (blocks / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST)
        return codes.reshape(weight.shape).to(torch.float8_e4m3fn), scale

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return decode(codes, scale, block=(_BLOCK, _BLOCK))

    def round_inputs(self, x: torch.Tensor) -> torch.Tensor:
        return round_rows_e4m3(x.unflatten(-1, (-1, _BLOCK))).flatten(-2)


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.reshape(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)


FP8 = Fp8()
