"""Layouts that engines read. A new one is one file here and one line in ``LAYOUTS``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantize.registry import Registry

if TYPE_CHECKING:
    from quantize.layouts.layout import Layout

LAYOUTS: Registry[Layout] = Registry(
    {
        "modelopt": "quantize.layouts.modelopt:MODELOPT",
        "compressed-tensors": "quantize.layouts.compressed_tensors:COMPRESSED_TENSORS",
    }
)
"""By name, as ``--layout`` takes it; see ``quantize.layouts.layout.Layout``."""


def detect(quantization_config: dict[str, Any]) -> Layout | None:
    """The layout of a checkpoint, None if it is not NVFP4 in a layout known here.

    Args:
        quantization_config: of the checkpoint's ``config.json``.
    """
    return next((ly for ly in LAYOUTS.values() if ly.describes(quantization_config)), None)


def config_files() -> set[str]:
    """Names of all JSON files that some layout writes beside ``config.json``."""
    return {name for layout in LAYOUTS.values() for name in layout.config_files}
