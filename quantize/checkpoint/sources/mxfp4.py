"""MXFP4: two E2M1 values per byte, and one scale, a power of two, for each 32 inputs.

The even input is in the low nibble. The value is ``e2m1(code) * 2 ** (scale - 127)``. Scales are U8
or F8_E8M0 ``[..., out, in / 32]``. A weight ``[..., out, in]`` is stored in one of three ways:

* GPT-OSS: stacked experts ``X`` are ``X_blocks``, U8 ``[..., out, in / 32, 16]``, and ``X_scales``.
  The unquantized ``X`` is ``[..., in, out]``: Transformers' ``convert_moe_packed_tensors``
  transposes them, and so does this module;
* compressed-tensors' ``mxfp4-pack-quantized``: ``X.weight_packed``, U8 ``[out, in / 2]``, and
  ``X.weight_scale``;
* under the weight's own name, U8 or I8 ``[..., out, in / 2]``. The scale is then called
  ``weight_scale`` (Quark), ``scale`` (DeepSeek-V4's experts, ``expert_dtype: fp4``), or, where
  experts are stacked, ``_scale_inv`` (DeepSeek-V4's experts as Transformers' ``FP8Experts`` holds
  them; ``Fp8Dequantize._unpack_fp4`` has the same order of nibbles).

Packed E2M1 values with E4M3 scales are NVFP4. This module does not find them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantize.checkpoint.sources.lookup import E2M1_PAIRS, lookup
from quantize.checkpoint.sources.mxfp8 import BLOCK, SCALE_DTYPES, apply
from quantize.checkpoint.sources.stored_weight import (
    ALONE,
    StoredWeight,
    from_pair,
    is_scale,
    scale_of,
)
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError

_PACKED = (".weight_packed", ".weight_scale")
_STACKED = ("_blocks", "_scales")


class MxFp4:
    """MXFP4; see ``quantize.checkpoint.sources.source_format.SourceFormat``."""

    name = "mxfp4"
    config_names = frozenset(
        {"mxfp4", "gpt_oss_mxfp4", "w4a8_mxfp4_fp8", "mxfp4-pack-quantized", "fp4"}
    )

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[StoredWeight]:
        found = []
        for codes in stored.values():
            if codes.dtype not in ("U8", "I8") or is_scale(codes.name):
                continue
            name, scale = _name_and_scale(codes, stored)
            if scale is not None and scale.dtype in SCALE_DTYPES:
                shape, how = _shape(codes, scale), decode
                if codes.name.endswith(_STACKED[0]):
                    shape, how = (*shape[:-2], *shape[:-3:-1]), decode_transposed
                found.append(from_pair(self.name, name, shape, (codes, scale), stored, how))
        return found

    def complaint(self, info: TensorInfo) -> str | None:
        return ALONE if info.dtype == "U8" and info.name.endswith(_STACKED) else None


MXFP4 = MxFp4()


def decode(
    codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Dequantize MXFP4 to float32 ``[..., in]``, exactly.

    Args:
        codes: bytes ``[..., in / 2]`` or ``[..., in / 32, 16]``.
        scale: E8M0 ``[..., in / 32]``.
        out: memory for the result, as for ``lookup``.
    """
    packed = codes.reshape(*scale.shape[:-1], -1)
    return apply(lookup(packed, E2M1_PAIRS, out), scale)


def decode_transposed(
    codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`decode`, but the result is a view ``[..., in, out]``, whose memory is not."""
    return decode(codes, scale, out).mT


def _name_and_scale(
    codes: TensorInfo, stored: Mapping[str, TensorInfo]
) -> tuple[str, TensorInfo | None]:
    """The name of the weight that ``codes`` belong to, and its scale (None if there is none)."""
    for (codes_suffix, scale_suffix), suffix in ((_PACKED, ".weight"), (_STACKED, "")):
        if codes.name.endswith(codes_suffix):
            stem = codes.name.removesuffix(codes_suffix)
            return stem + suffix, stored.get(stem + scale_suffix)
    return codes.name, scale_of(codes.name, stored)


def _shape(codes: TensorInfo, scale: TensorInfo) -> tuple[int, ...]:
    """The weight's shape; raises QuantizeError if codes and scales disagree on it."""
    *rows, blocks = scale.shape or (0,)
    flat, blocked = (*rows, blocks * BLOCK // 2), (*rows, blocks, BLOCK // 2)
    expected = blocked if codes.name.endswith(_STACKED[0]) else flat
    if codes.shape != expected:
        raise QuantizeError(
            f"{codes.name} {list(codes.shape)} and {scale.name} {list(scale.shape)} do not fit "
            f"together: MXFP4 has two codes a byte and one scale for {BLOCK} codes, so that "
            f"{list(expected)} was expected"
        )
    if 0 in expected:
        raise QuantizeError(
            f"{codes.name} has shape {list(codes.shape)}: a weight without elements; download the "
            "checkpoint again"
        )
    return (*rows, blocks * BLOCK)
