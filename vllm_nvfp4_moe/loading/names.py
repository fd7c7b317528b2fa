"""The matrices of one expert under a name that vLLM's class for the model has given them.

Aria's class inherits Llama's mapping of names, in which ``gate_proj`` and ``up_proj`` are parts of
``gate_up_proj``, and applies it to experts, too. An expert's gate then comes as half a matrix
(``quirks.MERGED_NAMES``).
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvfp4_moe import quirks

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_MERGED = re.compile(r"(?P<expert>\d+)\.gate_up_proj\.(?P<suffix>\w+)")


def keep_apart(layer: RoutedExperts) -> None:
    """Have ``layer`` take an expert's gate and up by their own names, where vLLM's mapping of names
    has merged them."""
    if not layer.ckpt_up_proj_name:
        return
    names = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name
    own = weakref.ref(layer)  # or the layer would hold itself

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        layer = own()
        assert layer is not None
        return type(layer).load_weights(layer, _apart(weights, names))

    layer.load_weights = load_weights


def _apart(
    weights: Iterable[tuple[str, torch.Tensor]], names: tuple[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights:
        merged = _MERGED.fullmatch(name)
        # vLLM's mapping notes on the tensor which part it is. A tensor of both has no note.
        part: Any = getattr(tensor, "shard_id", None)
        if merged and part in (0, 1):
            quirks.MERGED_NAMES.log()
            name = f"{merged['expert']}.{names[part]}.{merged['suffix']}"
        yield name, tensor
