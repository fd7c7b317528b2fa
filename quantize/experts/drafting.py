"""Multi-token-prediction layers, which are left as they are.

They are experts under a module called ``mtp…`` or ``nextn…`` (DeepSeek-V4, MiniMax-M3, Qwen3-Next,
Nemotron-H), or in a layer whose number is ``num_hidden_layers`` or above (DeepSeek-V3, GLM-4.5,
Step-3.7). They only draft what the model then checks, and engines build them apart from it.
"""

from __future__ import annotations

import re
from typing import Any

from quantize.experts.names import layer_number

_MTP = re.compile(r"(?:^|\.)(?:mtp|nextn)[^.]*(?:\.|$)")


def is_drafting(prefix: str, config: dict[str, Any]) -> bool:
    """Whether ``prefix`` is in a multi-token-prediction layer."""
    layers = config.get("num_hidden_layers")
    number = layer_number(prefix)
    beyond = isinstance(layers, int) and number is not None and number >= layers
    return beyond or _MTP.search(prefix) is not None
