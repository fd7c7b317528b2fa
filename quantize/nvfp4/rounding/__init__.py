"""Choosing codes by what a weight's inputs are: the error of its output, not of the weight.

A new rounding is one file here and one line in ``METHODS``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.registry import Registry

if TYPE_CHECKING:
    from quantize.nvfp4.rounding.method import Method

METHODS: Registry[Method] = Registry(
    {
        "gptq": "quantize.nvfp4.rounding.gptq:GPTQ",
        "descent": "quantize.nvfp4.rounding.descent:DESCENT",
        "two-sided": "quantize.nvfp4.rounding.two_sided:TWO_SIDED",
    }
)
"""By name, as ``--rounding`` takes it; see ``quantize.nvfp4.rounding.method.Method``."""
