"""Recognizing multi-token-prediction layers, whose experts are not quantized.

Such a layer is under a module called ``mtp…`` or ``nextn…`` (DeepSeek-V4, MiniMax-M3, Qwen3-Next,
Nemotron-H), or its number is ``num_hidden_layers`` or above (DeepSeek-V3, GLM-4.5, Step-3.7). These
layers only draft tokens, which the model then checks, and engines build them as a separate model.
"""

from __future__ import annotations

import re
from typing import Any

from quantize.experts.names import layer_number

_MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)[^.]*(?:\.|$)")


def is_drafting(prefix: str, config: dict[str, Any]) -> bool:
    """Whether the module path ``prefix`` is in a multi-token-prediction layer.

    Args:
        config: the language model's config.
    """
    layers = config.get("num_hidden_layers")
    number = layer_number(prefix)
    beyond = isinstance(layers, int) and number is not None and number >= layers
    return beyond or _MTP.search(prefix) is not None
