"""The interface of a format for the linears beside NVFP4 experts.

Codes are E4M3 in every one of them, in a tensor ``weight`` of the weight's shape ``[out, in]``, and
``weight_scale`` has a scale for each block. Activations are quantized by kernels while they run, so
nothing needs calibration.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from quantize.checkpoint.tensors import DTYPE_NAMES, TensorInfo

CODES, SCALE = "weight", "weight_scale"
"""The last parts of the names of a weight's two tensors, in both layouts."""

LARGEST = 448.0
"""The largest E4M3 value."""


class BaseFormat(Protocol):
    """One way to store linears in 8 bits.

    Attributes:
        name: its key in ``quantize.layouts.base.BASES``.
        modelopt: the entry of ModelOpt's ``quantized_layers`` for one module.
        preset: the compressed-tensors library's name of the scheme.
        format: the library's name of the format on disk.
        scale_dtype: of ``weight_scale``.
    """

    name: str
    modelopt: dict[str, Any]
    preset: str
    format: str
    scale_dtype: torch.dtype

    def fits(self, rows: int, columns: int) -> bool:
        """Whether engines read a weight of this shape, also where they join it with others."""

    def scale_shape(self, rows: int, columns: int, layout: str) -> tuple[int, ...]:
        """The shape of ``weight_scale`` on disk in a layout, a key of ``LAYOUTS``."""

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round ``weight``, float ``[out, in]``: E4M3 codes of the same shape, and scales.

        The scales are two-dimensional, ``[ceil(out / block rows), in / block columns]``.
        """

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Float32 ``[out, in]`` of what :meth:`encode` returns."""


def stored_base(
    module: str, shape: tuple[int, int], base: BaseFormat, layout: str
) -> tuple[TensorInfo, ...]:
    """The tensors that store the weight, of ``shape`` ``[out, in]``, of the linear ``module``."""
    scale = base.scale_shape(*shape, layout)
    return (
        TensorInfo(f"{module}.{CODES}", DTYPE_NAMES[torch.float8_e4m3fn], shape),
        TensorInfo(f"{module}.{SCALE}", DTYPE_NAMES[base.scale_dtype], scale),
    )
