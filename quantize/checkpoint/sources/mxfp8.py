"""MXFP8: E4M3 values, and one scale, a power of two, for each 32 inputs.

``weight`` is F8_E4M3 ``[..., out, in]``. Its scale is U8 or F8_E8M0 ``[..., out, in / 32]`` and is
called ``weight_scale_inv`` (MiniMax-M3, with DeepSeek's naming) or ``weight_scale`` (ModelOpt,
compressed-tensors' ``mxfp8-quantized``). The value is ``e4m3(code) * 2 ** (scale - 127)``. Sources:
OCP MX 1.0; vLLM 0.32's ``dequant_mxfp8_to_bf16``; Transformers 5's ``Fp8Dequantize``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantize.checkpoint.sources.lookup import E4M3, lookup, scale_values
from quantize.checkpoint.sources.stored_weight import (
    ALONE,
    StoredWeight,
    from_pair,
    is_scale,
    scale_of,
)
from quantize.checkpoint.tensors import TensorInfo

BLOCK = 32
"""Number of inputs that share one scale, in every MX format."""

SCALE_DTYPES = ("U8", "F8_E8M0")
"""Dtypes of MX scales in files. E8M0 has a name of its own only in newer versions of safetensors;
older files call it U8."""


class MxFp8:
    """MXFP8; see ``quantize.checkpoint.sources.source_format.SourceFormat``."""

    name = "mxfp8"
    config_names = frozenset({"mxfp8", "mxfp8-quantized"})

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[StoredWeight]:
        return [
            from_pair(self.name, name, info.shape, (info, scale), stored, decode)
            for name, info in stored.items()
            if (scale := scale_of(name, stored)) and is_mxfp8(info, scale)
        ]

    def complaint(self, info: TensorInfo) -> str | None:
        return ALONE if info.dtype == "F8_E8M0" else None


MXFP8 = MxFp8()


def is_mxfp8(weight: TensorInfo, scale: TensorInfo) -> bool:
    """Whether a weight is MXFP8.

    E4M3 codes whose scales have another shape are FP8 with larger blocks (``fp8_block``).
    """
    if weight.dtype != "F8_E4M3" or scale.dtype not in SCALE_DTYPES or is_scale(weight.name):
        return False
    if not weight.shape or 0 in weight.shape:
        return False
    *rows, inputs = weight.shape
    return inputs % BLOCK == 0 and scale.shape == (*rows, inputs // BLOCK)


def decode(
    codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Dequantize E4M3 ``[..., in]`` with E8M0 ``[..., in / 32]`` to float32 ``[..., in]``, exactly.

    ``out`` is memory for the result, as for ``lookup``.
    """
    return apply(lookup(codes, E4M3, out), scale)


def apply(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply ``values`` ``[..., in]`` in place by their E8M0 scales ``[..., in / 32]``."""
    values.unflatten(-1, (-1, BLOCK)).mul_(scale_values(scale).unsqueeze(-1))
    return values
