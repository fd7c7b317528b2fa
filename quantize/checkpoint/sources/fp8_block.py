"""FP8 (E4M3) with one scale for each block of weights, as DeepSeek-V3 publishes it.

``weight`` is F8_E4M3 ``[..., out, in]``, and ``weight_scale_inv`` is ``[..., ceil(out / 128),
ceil(in / 128)]`` (ModelOpt's ``FP8_PB_WO``: ``weight_scale``, with a 1 after each of the two). The
weight's value is ``e4m3(code) * scale``: despite its name, the scale multiplies. Sources:
DeepSeek-V3's ``inference/kernel.py`` (``weight_dequant``) and Transformers 5's ``Fp8Dequantize``.
The block's size is ``weight_block_size`` of the config, or 128 by 128 if the config does not say.
Scales are F32, BF16, F16 or, in DeepSeek-V4 (``scale_fmt: ue8m0``), powers of two.

E4M3 and E5M2 without a scale are left as they are stored: what is only copied keeps its bytes, and
is named to the user (:func:`without_scale`); experts cannot be quantized from them.

One scale per tensor or one per row (ModelOpt, compressed-tensors, Quark) is the same format with a
larger block. A stacked ``gate_up_proj`` holds two weights, gate and up, and each is cut into blocks
separately. Transformers does the same: ``_alloc_expert_proj`` makes at least two rows of scales,
and ``Fp8Dequantize`` takes a block's height from the number of rows of weights and of scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from quantize.checkpoint.sources.lookup import E4M3, lookup, scale_values
from quantize.checkpoint.sources.mxfp8 import SCALE_DTYPES, is_mxfp8
from quantize.checkpoint.sources.stored_weight import (
    ALONE,
    StoredWeight,
    from_pair,
    is_scale,
    quantization_config,
    scale_of,
)
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError

_DEFAULT_BLOCK = (128, 128)
_SCALES = ("F32", "BF16", "F16", *SCALE_DTYPES)


class Fp8Block:
    """FP8; see ``quantize.checkpoint.sources.source_format.SourceFormat``."""

    name = "fp8"
    config_names = frozenset(
        {
            *("fp8", "fbgemm_fp8", "deepseek_v4_fp8"),
            *("fp8_pb_wo", "fp8_per_channel_per_token"),  # ModelOpt
            *("float-quantized", "naive-quantized"),  # compressed-tensors
            "fp8_e4m3",  # Quark
        }
    )

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[StoredWeight]:
        block = _block_size(config)
        found = []
        for name, info in stored.items():
            if info.dtype != "F8_E4M3" or is_scale(name):
                continue
            scale = scale_of(name, stored)
            if scale is not None and not is_mxfp8(info, scale):
                cut = partial(decode, **_cut(info, scale, block))
                found.append(from_pair(self.name, name, info.shape, (info, scale), stored, cut))
        return found

    def complaint(self, info: TensorInfo) -> str | None:
        # Codes without a scale are no error here: parts that are only copied may be stored so.
        return ALONE if info.name.endswith("_scale_inv") else None


FP8_BLOCK = Fp8Block()


def without_scale(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """Those of a checkpoint's ``tensors``, as they are presented, that are FP8 without a scale."""
    return [t for t in tensors if t.dtype in ("F8_E4M3", "F8_E5M2") and not is_scale(t.name)]


def decode(
    codes: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    block: tuple[int, int],
    groups: int = 1,
) -> torch.Tensor:
    """Dequantize E4M3 ``[..., out, in]`` to float32 ``[..., out, in]``.

    The only rounding is that of the product of value and scale.

    Args:
        codes: F8_E4M3 ``[..., out, in]``.
        scale: one value for each block, in row-major order of the blocks, in any shape.
        out: memory for the result, as for ``lookup``.
        block: the number of rows and of columns that share a scale. The last block of a row or
            column may be smaller.
        groups: how many weights are stacked along ``out``; each is cut into blocks separately.
    """
    weight = lookup(codes, E4M3, out)
    *lead, outputs, inputs = weight.shape
    height, width = block
    rows = outputs // groups
    grid = (-(-rows // height), -(-inputs // width))
    stacked = weight.view(*lead, groups, rows, inputs)
    scale = scale_values(scale).reshape(*lead, groups, *grid)
    for across, scales_across, high in _pieces(rows, height):
        for along, scales_along, wide in _pieces(inputs, width):
            blocks = stacked[..., across, along].unflatten(-2, (-1, high)).unflatten(-1, (-1, wide))
            blocks.mul_(scale[..., scales_across, scales_along][..., :, None, :, None])
    return weight


def _pieces(size: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """Cut a dimension of ``size`` into its whole blocks and the smaller block that may remain.

    Yields for each piece the slice of weights, the slice of their scales, and the size of a block.
    All blocks of a piece have the same size, so scales are broadcast and not expanded in memory.
    """
    whole, rest = divmod(size, block)
    if whole:
        yield slice(0, whole * block), slice(0, whole), block
    if rest:
        yield slice(whole * block, size), slice(whole, whole + 1), rest


def _cut(weight: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> dict[str, Any]:
    """How ``weight`` is cut into blocks, as keyword arguments of :func:`decode`.

    Raises:
        QuantizeError: if the shapes or dtypes of weight and scale do not fit together.
    """
    if scale.dtype not in _SCALES:
        raise QuantizeError(f"{scale.name} has dtype {scale.dtype}, expected one of {_SCALES}")
    if len(weight.shape) < 2 or 0 in weight.shape:
        raise QuantizeError(f"{weight.name} has shape {list(weight.shape)}, expected a matrix")
    *lead, rows, columns = weight.shape
    groups = 2 if weight.name.endswith("gate_up_proj") and rows % 2 == 0 else 1
    grid = (groups * -(-rows // groups // block[0]), -(-columns // block[1]))
    modelopt = (*lead, grid[0], 1, grid[1], 1)  # its FP8_PB_WO
    if scale.shape in ((*lead, *grid), modelopt):
        return {"block": block, "groups": groups}
    if scale.shape in ((*lead, rows), (*lead, rows, 1)):
        return {"block": (1, columns)}
    if scale.shape in ((*lead,), (*lead, 1), (*lead, 1, 1)):
        return {"block": (rows, columns)}
    raise QuantizeError(
        f"{scale.name} has shape {list(scale.shape)}; {weight.name} {list(weight.shape)} needs "
        f"{[*lead, *grid]} (blocks of {block[0]} x {block[1]}), or one scale a row or a matrix"
    )


def _block_size(config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block: ``weight_block_size``, or compressed-tensors'
    ``block_structure``."""
    quantization = quantization_config(config)
    if not isinstance(quantization, dict):
        return _DEFAULT_BLOCK
    size = quantization.get("weight_block_size")
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        size = size or (weights.get("block_structure") if isinstance(weights, dict) else None)
    if size is None:
        return _DEFAULT_BLOCK
    if not isinstance(size, list) or [type(n) for n in size] != [int, int] or min(size) < 1:
        raise QuantizeError(
            f"config.json: weight_block_size is {size!r}; expected two positive integers"
        )
    return size[0], size[1]
