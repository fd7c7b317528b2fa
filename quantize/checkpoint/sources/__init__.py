"""Quantized formats of source checkpoints (FP8, MXFP8, MXFP4, NVFP4, INT4), dequantized when read.

A weight in such a format is stored as several tensors: codes and scales. ``find`` finds them by
their names, dtypes and shapes, and ``quantize.checkpoint.reader`` presents them to the rest of the
package as one tensor of floats. ``refusals`` rejects the formats that cannot, or should not, be
read. To add a format, write one file here and add one line to ``FORMATS``.

This room may import ``quantize.checkpoint.tensors``, ``quantize.checkpoint.descriptions``,
``quantize.nvfp4``, ``quantize.errors`` and ``quantize.registry``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.registry import Registry

if TYPE_CHECKING:
    from quantize.checkpoint.sources.source_format import SourceFormat

FORMATS: Registry[SourceFormat] = Registry(
    {
        "fp8": "quantize.checkpoint.sources.fp8_block:FP8_BLOCK",
        "mxfp8": "quantize.checkpoint.sources.mxfp8:MXFP8",
        "mxfp4": "quantize.checkpoint.sources.mxfp4:MXFP4",
        "nvfp4": "quantize.checkpoint.sources.nvfp4:NVFP4",
        "pack-quantized": "quantize.checkpoint.sources.pack_quantized:PACK_QUANTIZED",
    }
)
"""All formats, by name; see ``quantize.checkpoint.sources.source_format.SourceFormat``."""
