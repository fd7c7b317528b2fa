"""Scale rules: how block scales and global scales are chosen.

``RULES`` holds all rules by name. To add one, write one file here with a ``rule.ScaleRule`` and add
one line to ``RULES``. This room may import ``quantize.nvfp4.format`` and ``quantize.registry``.
"""

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
        "unbiased": "quantize.nvfp4.scales.unbiased:UNBIASED",
        "power-of-two": "quantize.nvfp4.scales.power_of_two:POWER_OF_TWO",
    }
)
"""All rules, by the name that ``--scales`` takes; see ``quantize.nvfp4.scales.rule.ScaleRule``."""
