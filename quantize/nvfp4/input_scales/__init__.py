"""Input scale rules: from what experts are given on a text to the scale of their inputs.

An input scale is what E4M3 block scales of activations are relative to. It is fixed when the
checkpoint is made; block scales are found while the model runs. ``INPUT_RULES`` holds all
rules by name. To add one, write one file here with a function and add one line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quantize.registry import Registry

if TYPE_CHECKING:
    from quantize.nvfp4.input_scales.magnitudes import Magnitudes

INPUT_RULES: Registry[Callable[[Magnitudes], float]] = Registry(
    {
        "max": "quantize.nvfp4.input_scales.max:max_scale",
        "headroom": "quantize.nvfp4.input_scales.headroom:headroom_scale",
    }
)
"""All rules, by the name that ``--input-scale-rule`` takes. Each takes the magnitudes of all inputs
that a product was given, and returns a positive number as it multiplies; 1 if all were zero."""
