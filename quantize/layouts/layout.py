"""The interface of a layout: the tensors of a quantized weight on disk, and the config."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import torch

from quantize.checkpoint.tensors import DTYPE_NAMES, TensorInfo
from quantize.layouts.beside import NOTHING, Beside
from quantize.nvfp4.format import BLOCK, NvFp4

INPUT_SCALE = 1.0
"""The input scale where nobody knows a layer's inputs. Kernels that quantize activations to NVFP4
lose a block of 16 inputs whose largest is below ``6 * 2**-10`` then (half the smallest E4M3 scale),
so this is written only for who asks for it."""


class Layout(Protocol):
    """One way to store the NVFP4 weights of linear layers.

    Attributes:
        name: its key in ``quantize.layouts.LAYOUTS``.
        suffixes: the last parts of the names of one weight's tensors, in the order in which files
            hold them: codes, block scale, global scale and, unless the layout is for weights only,
            input scale.
        reciprocal: whether global and input scales are stored as their reciprocals, which divide.
        weights_only: the same layout as it describes checkpoints whose activations stay floats, and
            so without input scales; the layout itself if it is one for weights alone.
        config_files: the names of the JSON files that it writes beside ``config.json``.
        kv_caches: the kinds of key-value caches that it can ask for (``fp8``; the others are in
            ``quantize.checkpoint.kv_cache``), each with its ``kv_cache_scheme``.
    """

    name: str
    suffixes: tuple[str, ...]
    reciprocal: bool
    config_files: tuple[str, ...]
    kv_caches: Mapping[str, dict[str, Any]]

    @property
    def weights_only(self) -> Layout: ...

    def __hash__(self) -> int:
        """Layouts are single objects, by which sizes are cached."""

    def store(self, weight: NvFp4) -> dict[str, torch.Tensor]:
        """The tensors of a weight, by suffix, without those of its input scale."""

    def store_input_scale(self, input_scale: float) -> dict[str, torch.Tensor]:
        """The tensors of an input scale, by suffix; empty if the layout has no input scales."""

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> tuple[NvFp4, torch.Tensor | None]:
        """The weight and its input scale (float32 scalar, or None) from their stored tensors.

        This is the inverse of :meth:`store` and :meth:`store_input_scale`.

        Args:
            tensors: the tensors by suffix. The input scale may be missing, as it is in weight-only
                checkpoints of other tools.
        """

    def quantization_config(self, ignore: list[str], beside: Beside = NOTHING) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``.

        Args:
            ignore: the module paths of the linears that are not quantized.
            beside: what is quantized in another format.
        """

    def extra_files(self, ignore: list[str], beside: Beside = NOTHING) -> dict[str, dict[str, Any]]:
        """The contents of ``config_files``, by name. The arguments are as above."""

    def stays_float(self, quantization_config: dict[str, Any], module: str) -> bool:
        """Whether a config in this layout says that the activations at a module in NVFP4 stay
        floats, so that the weight has no input scale."""

    def describes(self, quantization_config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this ``quantization_config`` is NVFP4 in this layout.

        ``weights_only`` describes those whose activations all stay floats, and the layout itself
        all others.
        """


def stored_tensors(module: str, shape: tuple[int, int], layout: Layout) -> tuple[TensorInfo, ...]:
    """The tensors that store the weight, of ``shape`` ``[out, in]``, of the linear ``module``."""
    return tuple(
        TensorInfo(f"{module}.{suffix}", dtype, dims)
        for suffix, dtype, dims in _stored(shape, layout)
    )


@cache
def stored_nbytes(shape: tuple[int, int], layout: Layout) -> int:
    """Bytes of what :func:`stored_tensors` lists."""
    return sum(out.nbytes for out in stored_tensors("", shape, layout))


@cache
def _stored(shape: tuple[int, int], layout: Layout) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Suffix, dtype and shape of each tensor that stores a weight of ``shape``.

    The result is cached, since a model may have tens of thousands of experts of the same shape.
    """
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
