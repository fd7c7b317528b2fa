"""Formats that source checkpoints are already quantized in, dequantized on the way in.

A weight in such a format is stored as several tensors, codes and scales. Here they are found, by
names, dtypes and shapes, and presented to the rest of the package as one tensor of floats. A new
format is one file here, with a class like :class:`SourceFormat`, and one entry in ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from quantize.checkpoint.sources.fp8_block import Fp8Block
from quantize.checkpoint.sources.mxfp4 import MxFp4
from quantize.checkpoint.sources.mxfp8 import MxFp8
from quantize.checkpoint.sources.refusals import check_complete
from quantize.checkpoint.sources.refusals import check_config as check_config
from quantize.checkpoint.sources.refusals import undecodable as undecodable
from quantize.checkpoint.sources.stored_weight import Encoded as Encoded

if TYPE_CHECKING:
    from quantize.checkpoint.tensors import TensorInfo


class SourceFormat(Protocol):
    """One way in which published checkpoints are quantized."""

    name: str

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[Encoded]:
        """All weights in this format.

        Raises:
            QuantizeError: naming the tensor, if one is of the wrong shape or dtype.
        """


FORMATS: dict[str, SourceFormat] = {fmt.name: fmt for fmt in (Fp8Block(), MxFp8(), MxFp4())}


def find_encoded(stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> dict[str, Encoded]:
    """All weights of a checkpoint that are stored in one of ``FORMATS``, by name.

    Args:
        stored: every tensor in the checkpoint's files.
        config: its ``config.json``.

    Raises:
        QuantizeError: naming a tensor that does not fit, or that lacks its counterpart.
    """
    found = [e for fmt in FORMATS.values() for e in fmt.find(stored, config)]
    check_complete(stored, found)
    return {encoded.name: encoded for encoded in found}
