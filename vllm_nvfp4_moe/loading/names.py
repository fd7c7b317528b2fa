"""Tensors of a layer's experts that come under names of which vLLM's ``RoutedExperts`` makes
something else, or nothing.

* Aria's class inherits Llama's mapping of names, in which ``gate_proj`` and ``up_proj`` are parts
  of ``gate_up_proj``, and applies it to experts, too. An expert's gate then comes as half a matrix
  (``quirks.MERGED_NAMES``).
* Laguna's checkpoints have the router's correction bias among the experts, and vLLM passes over it
  without a word (``quirks.BIAS_AMONG_EXPERTS``).
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_nvfp4_moe import quirks

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

_MERGED = re.compile(r"(?P<expert>\d+)\.gate_up_proj\.(?P<suffix>\w+)")
_BIAS = "e_score_correction_bias"


def heed(layer: RoutedExperts) -> None:
    """Have ``layer`` take an expert's gate and up by their own names, where vLLM's mapping of names
    has merged them, and its router's correction bias."""
    own = weakref.ref(layer)  # or the layer would hold itself

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        layer = own()
        assert layer is not None
        taken: list[str] = []
        yield from type(layer).load_weights(layer, _known(layer, weights, taken))
        yield from taken

    layer.load_weights = load_weights


def _known(
    layer: RoutedExperts, weights: Iterable[tuple[str, torch.Tensor]], taken: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What ``RoutedExperts`` can load of ``weights``; names of what was loaded here are added to
    ``taken``."""
    bias = layer.e_score_correction_bias
    for name, tensor in weights:
        merged = _MERGED.fullmatch(name)
        # vLLM's mapping notes on the tensor which part it is. A tensor of both has no note.
        part: Any = getattr(tensor, "shard_id", None)
        if name == _BIAS and bias is not None:
            quirks.BIAS_AMONG_EXPERTS.log()
            getattr(bias, "weight_loader", default_weight_loader)(bias, tensor)
            taken.append(name)
        elif merged and part in (0, 1):
            quirks.MERGED_NAMES.log()
            names = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name
            yield f"{merged['expert']}.{names[part]}.{merged['suffix']}", tensor
        else:
            yield name, tensor
