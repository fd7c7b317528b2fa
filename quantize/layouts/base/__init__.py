"""Formats of 8 bits for what is beside NVFP4 experts: attention, shared experts, dense layers, and
the experts of other layers.

Start at ``BASES`` (all of them by name) and ``quantize.layouts.base.base_format``. To add one,
write one file here and add one line to ``BASES``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.registry import Registry

if TYPE_CHECKING:
    from quantize.layouts.base.base_format import BaseFormat

BASES: Registry[BaseFormat] = Registry(
    {
        "fp8": "quantize.layouts.base.fp8:FP8",
        "mxfp8": "quantize.layouts.base.mxfp8:MXFP8",
    }
)
"""By the name that ``--base`` takes. ``--bits`` chooses among all of them."""
