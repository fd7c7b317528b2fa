"""Recognizing multi-token-prediction layers, whose experts are not quantized.

Such a layer is under a module called ``mtp…`` or ``nextn…`` (DeepSeek-V4, MiniMax-M3, Qwen3-Next,
Nemotron-H), or its number is ``num_hidden_layers`` or above (DeepSeek-V3, GLM-4.5, Step-3.7). These
layers only draft tokens, which the model then checks, and engines build them as a separate model.
"""

from __future__ import annotations

import re
from typing import Any

from quantize.experts.names import layer_number
from quantize.experts.stated import number_of_layers

_MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)[^.]*(?:\.|$)")


def is_drafting(prefix: str, config: dict[str, Any]) -> bool:
    """Whether the module path ``prefix`` is in a multi-token-prediction layer.

    Args:
        config: the config of the part of the model that ``prefix`` is in.
    """
    layers = number_of_layers(config)
    number = layer_number(prefix)
    beyond = layers is not None and number is not None and number >= layers
    return beyond or _MTP.search(prefix) is not None
