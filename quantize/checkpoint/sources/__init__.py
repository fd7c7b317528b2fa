"""Formats that source checkpoints are already quantized in, dequantized on the way in.

A weight in such a format is stored as several tensors, codes and scales. They are found by their
names, dtypes and shapes, and presented to the rest of the package as one tensor of floats. A new
format is one file here and one line in ``FORMATS``.
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
    }
)
"""By name; see ``quantize.checkpoint.sources.source_format.SourceFormat``."""
