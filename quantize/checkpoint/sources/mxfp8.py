"""MXFP8: E4M3 values, and one power of two for 32 inputs.

``weight`` F8_E4M3 ``[..., out, in]`` with ``weight_scale_inv`` (MiniMax-M3, DeepSeek's naming) or
``weight_scale`` (ModelOpt, compressed-tensors' ``mxfp8-quantized``), U8 or F8_E8M0
``[..., out, in / 32]``, means ``e4m3(code) * 2 ** (scale - 127)``. Sources: OCP MX 1.0; vLLM 0.32's
``dequant_mxfp8_to_bf16``; Transformers 5's ``Fp8Dequantize``.
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
"""Inputs that share one scale, in every MX format."""

SCALE_DTYPES = ("U8", "F8_E8M0")
"""How files call the dtype of MX scales; safetensors got a name for it only lately."""


class MxFp8:
    """See ``quantize.checkpoint.sources.SourceFormat``."""

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
    """Whether a weight is MXFP8; if its scales have another shape, it is FP8 with larger blocks."""
    if weight.dtype != "F8_E4M3" or scale.dtype not in SCALE_DTYPES or is_scale(weight.name):
        return False
    if not weight.shape or 0 in weight.shape:
        return False
    *rows, inputs = weight.shape
    return inputs % BLOCK == 0 and scale.shape == (*rows, inputs // BLOCK)


def decode(
    codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Float32 ``[..., in]`` from E4M3 ``[..., in]`` and E8M0 ``[..., in / 32]``; exact."""
    return apply(lookup(codes, E4M3, out), scale)


def apply(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply ``values`` ``[..., in]`` in place by their E8M0 scales ``[..., in / 32]``."""
    values.unflatten(-1, (-1, BLOCK)).mul_(scale_values(scale).unsqueeze(-1))
    return values
