"""What a layout is: what one quantized weight is called on disk, and the config beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import torch

from quantize.checkpoint.tensors import DTYPE_NAMES, TensorInfo
from quantize.nvfp4.format import BLOCK, NvFp4

INPUT_SCALE = 1.0
"""The input scale of a quantized layer that has not been calibrated."""


class Layout(Protocol):
    """One way to write NVFP4 linear weights.

    Attributes:
        name: its key in ``quantize.layouts.LAYOUTS``.
        suffixes: of all tensors of one weight, in the order in which files hold them: codes, block
            scale, global scale and, unless the layout is for weights alone, input scale.
        reciprocal: global and input scales are stored as what divides, not what multiplies.
        config_files: names of the JSON files that it writes beside ``config.json``.
    """

    name: str
    suffixes: tuple[str, ...]
    reciprocal: bool
    config_files: tuple[str, ...]

    def store(self, weight: NvFp4) -> dict[str, torch.Tensor]:
        """The tensors that a weight is stored as, by suffix; all but the input scale's."""

    def store_input_scale(self, input_scale: float) -> dict[str, torch.Tensor]:
        """The tensors that an input scale is stored as, by suffix; none in a layout without."""

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> tuple[NvFp4, torch.Tensor | None]:
        """Inverse of both: the weight, and the input scale (float32 scalar) if there is one.

        Args:
            tensors: by suffix; an input scale may be missing, as in others' weight-only files.
        """

    def quantization_config(self, ignore: list[str]) -> dict[str, Any]:
        """``config.json``'s ``quantization_config``; ``ignore``: linear modules that stay."""

    def extra_files(self, ignore: list[str]) -> dict[str, dict[str, Any]]:
        """What ``config_files`` hold, by name."""

    def describes(self, quantization_config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this ``quantization_config`` is NVFP4 in this layout."""


def stored_tensors(module: str, shape: tuple[int, int], layout: Layout) -> tuple[TensorInfo, ...]:
    """The tensors that one quantized weight of ``shape`` ``[out, in]`` is written as."""
    return tuple(
        TensorInfo(f"{module}.{suffix}", dtype, dims)
        for suffix, dtype, dims in _stored(shape, layout)  # type: ignore[arg-type]
    )


def stored_nbytes(shape: tuple[int, int], layout: Layout) -> int:
    """Bytes of what :func:`stored_tensors` lists."""
    return _stored_nbytes(shape, layout)  # type: ignore[arg-type]


@cache
def _stored_nbytes(shape: tuple[int, int], layout: Layout) -> int:
    return sum(out.nbytes for out in stored_tensors("", shape, layout))


@cache
def _stored(shape: tuple[int, int], layout: Layout) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Suffix, dtype and shape of each tensor that a layout makes of a weight: alike for all
    experts, of which a model may have tens of thousands."""
    rows, columns = shape
    weight = NvFp4(
        torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta"),
        torch.empty(rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty((), device="meta"),
    )
    example = layout.store(weight) | layout.store_input_scale(INPUT_SCALE)
    return tuple(
        (suffix, DTYPE_NAMES[example[suffix].dtype], tuple(example[suffix].shape))
        for suffix in layout.suffixes
    )
