"""Rules that choose scales. A new rule is one file here and one line in ``RULES``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.registry import Registry

if TYPE_CHECKING:
    from quantize.nvfp4.scales.rule import ScaleRule

RULES: Registry[ScaleRule] = Registry(
    {
        "max": "quantize.nvfp4.scales.max:MAX",
        "four-six": "quantize.nvfp4.scales.four_six:FOUR_SIX",
        "mse": "quantize.nvfp4.scales.mse:MSE",
    }
)
"""By name, as ``--scales`` takes it; see ``quantize.nvfp4.scales.rule.ScaleRule``."""
