"""Layouts: how NVFP4 weights are named on disk and described in the config, for engines to read.

Start at ``LAYOUTS`` (all layouts by name) and :func:`detect` (the layout of a given checkpoint). To
add a layout, write one file here and add one line to ``LAYOUTS``. This room may import
``quantize.experts``, ``quantize.checkpoint``, ``quantize.nvfp4``, ``quantize.errors`` and
``quantize.registry``.
"""

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
"""All layouts, by the name that ``--layout`` takes; see ``quantize.layouts.layout.Layout``."""


def detect(quantization_config: dict[str, Any]) -> Layout | None:
    """The layout of a checkpoint; None if it is not NVFP4 in a known layout.

    Where all activations stay floats, it is the layout's ``weights_only``.

    Args:
        quantization_config: ``quantization_config`` of the checkpoint's ``config.json``.
    """
    variants = (variant for ly in LAYOUTS.values() for variant in (ly, ly.weights_only))
    return next((ly for ly in variants if ly.describes(quantization_config)), None)


def config_files() -> set[str]:
    """Names of all JSON files that any layout writes beside ``config.json``."""
    return {name for layout in LAYOUTS.values() for name in layout.config_files}
