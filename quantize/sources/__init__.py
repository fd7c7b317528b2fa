"""Formats that source checkpoints are already quantized in, dequantized on the way in.

A weight in such a format is stored as several tensors, codes and scales. Here they are found, by
names, dtypes and shapes, and presented to the rest of the package as one tensor of floats. A new
format is one file here, with a class like :class:`SourceFormat`, and one entry in ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from quantize.checkpoint import TensorInfo


@dataclass(frozen=True)
class Encoded:
    """One weight that is stored as several tensors.

    Attributes:
        format: name of its :class:`SourceFormat`.
        name: what the weight is called in an unquantized checkpoint.
        shape: of the weight; stacked experts have a leading dimension, in the parts too.
        parts: names of the stored tensors.
        decode: from the parts, in that order (or from one expert's slice of each), to the float32
            weight.
    """

    format: str
    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    decode: Callable[..., torch.Tensor]


class SourceFormat(Protocol):
    """One way in which published checkpoints are quantized."""

    name: str

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[Encoded]:
        """All weights in this format.

        Raises:
            QuantizeError: naming the tensor, if one is incomplete or of the wrong shape.
        """


FORMATS: dict[str, SourceFormat] = {}


def find_encoded(stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> dict[str, Encoded]:
    """All weights of a checkpoint that are stored in one of ``FORMATS``, by name.

    Args:
        stored: every tensor in the checkpoint's files.
        config: its ``config.json``.
    """
    found = [e for fmt in FORMATS.values() for e in fmt.find(stored, config)]
    return {encoded.name: encoded for encoded in found}
