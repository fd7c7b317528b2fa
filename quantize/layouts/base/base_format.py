"""The interface of a format for what is beside NVFP4 experts: linears, and experts of other layers.

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

SCALES = (SCALE, "weight_scale_inv")
"""All that a format may call its scale; see :meth:`BaseFormat.scale_name`."""

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
        bits: of a weight, its share of the scale included.
    """

    name: str
    modelopt: dict[str, Any]
    preset: str
    format: str
    scale_dtype: torch.dtype
    bits: float

    def fits(self, rows: int, columns: int) -> bool:
        """Whether engines read a weight of this shape, also where they join it with others."""

    def scale_name(self, layout: str, expert: bool) -> str:
        """What the scale is called in a layout, a key of ``LAYOUTS``: one of ``SCALES``.

        Args:
            expert: of a routed expert, whose readers in vLLM are others than those of linears.
        """

    def scale_shape(self, rows: int, columns: int, layout: str, expert: bool) -> tuple[int, ...]:
        """Its shape on disk. The arguments are as above."""

    def encode(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round ``weight``, float ``[out, in]``: E4M3 codes of the same shape, and scales.

        The scales are two-dimensional, ``[ceil(out / block rows), in / block columns]``.
        """

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Float32 ``[out, in]`` of what :meth:`encode` returns."""

    def round_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs ``[n, in]`` as the format's kernels round them while they run, in their dtype."""


def stored_base(
    module: str, shape: tuple[int, int], base: BaseFormat, layout: str, expert: bool = False
) -> tuple[TensorInfo, TensorInfo]:
    """The tensors that store the weight, of ``shape`` ``[out, in]``, of the linear ``module``.

    Args:
        expert: it is a routed expert's.
    """
    name = base.scale_name(layout, expert)
    scale = base.scale_shape(*shape, layout, expert)
    return (
        TensorInfo(f"{module}.{CODES}", DTYPE_NAMES[torch.float8_e4m3fn], shape),
        TensorInfo(f"{module}.{name}", DTYPE_NAMES[base.scale_dtype], scale),
    )
