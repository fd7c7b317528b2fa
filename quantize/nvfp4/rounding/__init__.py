"""Rounding methods: they choose codes and block scales for the error of a weight's *output*.

A new method is one file in this folder and one line in ``METHODS``. The file holds a function
(``method.Round`` says what it takes and returns) and a ``method.Method`` that wraps it.
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
