"""Formats of 8 bits in which vLLM's class for a model cannot load experts, so that ``--bits`` does
not choose them.

vLLM serves such experts without an error, with scales that nothing was loaded into. What is here
was found by reading ``load_weights`` and the mappings of names of all classes of 0.32 and 0.33.
Whoever supports a new version of vLLM drops what has gone. What lacks here, the plugin refuses
(``vllm_nvfp4_moe.loading.unloaded``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Unreadable(NamedTuple):
    """A format that a class does not load.

    Attributes:
        architectures: of the models that vLLM has the class for, as ``config.json`` names them.
        layouts: keys of ``LAYOUTS``.
        formats: keys of ``BASES``.
        why: what the class does, and in which file of vLLM's.
    """

    architectures: tuple[str, ...]
    layouts: tuple[str, ...]
    formats: tuple[str, ...]
    why: str


UNREADABLE = (
    Unreadable(
        ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"),
        ("modelopt",),
        ("fp8",),
        "takes weight_scale_inv for weight_scale (vLLM 0.33, models/minimax_m3/nvidia/model.py)",
    ),
    Unreadable(
        ("Mistral3ForConditionalGeneration",),
        ("modelopt",),
        ("fp8",),
        "takes weight_scale_inv for weight_scale (vLLM 0.33, model_executor/models/mistral3.py)",
    ),
    Unreadable(
        ("DbrxForCausalLM",),
        ("modelopt", "compressed-tensors"),
        ("fp8", "mxfp8"),
        "has no names for one expert's tensors (vLLM 0.33, model_executor/models/dbrx.py)",
    ),
    Unreadable(
        ("AriaForConditionalGeneration",),
        ("modelopt", "compressed-tensors"),
        ("fp8", "mxfp8"),
        "takes an expert's gate for both gate and up (vLLM 0.33, model_executor/models/aria.py)",
    ),
)


def unreadable(config: Mapping[str, Any], layout: str) -> dict[str, str]:
    """The formats that vLLM's class for a model does not load in a layout, each with the reason.

    Args:
        config: the contents of ``config.json``.
        layout: a key of ``LAYOUTS``.
    """
    listed = config.get("architectures")
    names = listed if isinstance(listed, list) else []
    named = {name for name in names if isinstance(name, str)}
    return {
        name: each.why
        for each in UNREADABLE
        if named.intersection(each.architectures) and layout in each.layouts
        for name in each.formats
    }
