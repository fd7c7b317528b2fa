"""Telling a language model's experts from those of other parts: towers, talkers, codecs.

What such a part computes is not what a language model's text shows, and engines build it by code
that knows no quantized experts. So its experts stay, unless the user asks for them by name.
"""

from __future__ import annotations

import re
from typing import Any

from quantize.checkpoint.language import LANGUAGE, language_config

_OTHER = re.compile(
    r"vision|visual|image|video|audio|speech|sound|talker|codec|code_predictor|code2wav|token2wav"
    r"|vocoder|siglip|clip|(?:^|_)(?:vit|sam)(?:_|$)"
)
"""What names of modules contain that are no language model."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.\d+(?:\.|$)")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers")


def other_part(prefix: str, config: dict[str, Any]) -> str | None:
    """The name of the part that the module at ``prefix`` is in; None if it is the language model.

    Only names above the layers tell: a layer of a language model may have experts of its own for
    images (Ernie 4.5 VL). They tell if they say what the part is for, or if the config describes a
    part of that name, with layers of its own, beside the language model.

    Args:
        prefix: a module path, such as ``vision_encoder.layers.0.mlp.experts``.
        config: the contents of ``config.json``.
    """
    found = _LAYER.search(prefix)
    above = prefix[: found.start()] if found else prefix
    described = _described(config)
    for name in above.split("."):
        if _OTHER.search(name) or any(f"{name}_".startswith(f"{stem}_") for stem in described):
            return name
    return None


def names_part(pattern: str, part: str) -> bool:
    """Whether a pattern of module paths names ``part``, rather than matching whatever there is."""
    return part in pattern or _OTHER.search(pattern) is not None


def config_of_part(part: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """The config of the part ``part`` (None: the language model); empty if there is none."""
    if part is None:
        return language_config(config)
    for stem, nested in _described(config).items():
        if stem in part or part in stem:
            return language_config(nested)
    return {}


def _described(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs of parts beside the language model that have layers, by the parts' names."""
    found: dict[str, dict[str, Any]] = {}
    for key, nested in config.items():
        if not isinstance(nested, dict) or not key.endswith("_config"):
            continue
        if key in LANGUAGE:
            found |= _described(nested)
        elif any(depth in language_config(nested) for depth in _DEPTHS):
            found[key.removesuffix("_config")] = nested
    return found
