"""What a checkpoint's config says of a module in NVFP4, whichever layout it is in."""

from __future__ import annotations

from typing import Any

from quantize.checkpoint.descriptions import descriptions
from quantize.layouts import detect


def stays_float(config: dict[str, Any], module: str) -> bool:
    """Whether it says that what goes into the module's product is not quantized.

    Args:
        config: the contents of ``config.json``.
    """
    for _, value in descriptions(config):
        layout = detect(value) if isinstance(value, dict) else None
        if layout is not None:
            return layout.stays_float(value, module)
    return False
