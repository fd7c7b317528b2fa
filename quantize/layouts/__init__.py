"""Layouts that engines read: how one quantized weight is called on disk, and the config beside it.

A new layout is one file here, with a class like :class:`Layout`, and one entry in ``LAYOUTS``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from quantize.layouts.compressed_tensors import CompressedTensors
from quantize.layouts.modelopt import ModelOpt
from quantize.nvfp4 import NvFp4


class Layout(Protocol):
    """One way to write NVFP4 linear weights.

    Attributes:
        name: as ``--layout`` takes it.
        suffixes: of the four tensors of one weight: codes, block scale, global scale, input scale.
        reciprocal: global and input scales are stored as what divides, not what multiplies.
    """

    name: str
    suffixes: tuple[str, str, str, str]
    reciprocal: bool

    def store(self, weight: NvFp4, input_scale: float) -> tuple[torch.Tensor, ...]:
        """The four tensors, in the order of ``suffixes``."""

    def restore(self, tensors: tuple[torch.Tensor, ...]) -> tuple[NvFp4, torch.Tensor]:
        """Inverse of :meth:`store`: the weight, and the input scale (float32 scalar)."""

    def quantization_config(self, ignore: list[str]) -> dict[str, Any]:
        """``config.json``'s ``quantization_config``; ``ignore``: linear modules that stay."""

    def extra_files(self, ignore: list[str]) -> dict[str, dict[str, Any]]:
        """Further JSON files of the checkpoint, by name."""

    def describes(self, quantization_config: dict[str, Any]) -> bool:
        """Whether a checkpoint with this ``quantization_config`` is NVFP4 in this layout."""


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (ModelOpt(), CompressedTensors())}


def detect(quantization_config: dict[str, Any]) -> Layout | None:
    """The layout of a checkpoint, None if it is not NVFP4 in a layout known here."""
    return next((ly for ly in LAYOUTS.values() if ly.describes(quantization_config)), None)
