"""Experts on their way into vLLM's own class for Muse Spark (``quirks.MUSE_SPARK``).

That class gives its experts' layers a method of its own, which runs NVFP4 with the norm after down
that this package has no kernel for. It loads stacks of all experts alone, in these names and
shapes (vLLM 0.33, ``models/muse_spark/common``: ``moe.py``, and the names in ``omni.py``)::

    mlp.experts.gate_up_proj                 [experts, 2 * intermediate, hidden / 2]    uint8
    mlp.experts.gate_up_proj_weight_scale    [experts, 2 * intermediate, hidden / 16]   E4M3
    mlp.experts.gate_up_proj_weight_scale_2  [experts, 2]                               float32
    mlp.experts.gate_up_proj_input_scale     [experts, 2]                               float32
    mlp.experts.down_proj                    [experts, hidden, intermediate / 2]        uint8
    mlp.experts.down_proj_weight_scale       [experts, hidden, intermediate / 16]       E4M3
    mlp.experts.down_proj_weight_scale_2     [experts]                                  float32
    mlp.experts.down_proj_input_scale        [experts]                                  float32

This package, as ModelOpt for all other models, writes each expert's tensors. RoutedExperts, the
base of that class's layers, knows their names, so those go there: once gate and up are called so
again, which the class's mapping of names, Llama's, makes ``gate_up_proj`` of with a number.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.loading import unloaded

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.loading.stored import Stored

_MODULE = "vllm.models.muse_spark.common.moe"
_ONE = re.compile(r"\d+\..+")
"""A tensor of one expert, by its name below the layer."""
_MAPPED = ".gate_up_proj."
_HALVES = (".gate_proj.", ".up_proj.")
"""By the number that the mapping gives to the tensor, its ``shard_id``."""
_OTHER_KERNEL = "MuseSpark NVFP4 MoE requires FLASHINFER_TRTLLM or Marlin"
_ACTIVATIONS = "MuseSpark NVFP4 MoE requires W4A4"


def load_one_by_one(model: torch.nn.Module, stored: Stored) -> None:
    """If ``model`` is of that class, have its experts' layers take single experts, too, and refuse
    those into which not all was loaded.

    Args:
        stored: the checkpoint's headers.
    """
    module = sys.modules.get(_MODULE)
    if module is None:
        return
    for layer in model.modules():
        if isinstance(layer, module.MuseSparkConsolidatedRoutedExperts):
            _exchange(layer)
            if hasattr(layer, "w13_weight_scale"):  # vLLM's layers in bf16 have none
                unloaded.guard_built(layer, layer.layer_name, stored)


def _exchange(layer: RoutedExperts) -> None:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    own = weakref.ref(layer)  # or the layer would hold itself

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        layer = own()
        assert layer is not None
        for one, run in groupby(weights, lambda each: _ONE.fullmatch(each[0]) is not None):
            if one:
                quirks.MUSE_SPARK.log()
                yield from RoutedExperts.load_weights(layer, map(_named, run))
            else:
                yield from type(layer).load_weights(layer, run)

    attribute: Any = load_weights
    layer.load_weights = attribute


def _named(weight: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """One expert's tensor by the name that it has in the checkpoint."""
    name, tensor = weight
    half = getattr(tensor, "shard_id", None)
    return name if half is None else name.replace(_MAPPED, _HALVES[half]), tensor


@contextmanager
def explained() -> Iterator[None]:
    """While a model is built: what that class asks of kernels and checkpoints, as what to do.

    Raises:
        RefusedError: if it cannot run NVFP4 so.
    """
    try:
        yield
    except NotImplementedError as error:
        said = str(error)
        if said.startswith(_OTHER_KERNEL):
            raise RefusedError(
                "vLLM's class for Muse Spark runs NVFP4 experts by Marlin alone on Hopper GPUs, "
                "and by FlashInfer's TRTLLM kernel alone on Blackwell. Start with --moe-backend "
                f"marlin, or on Blackwell with --moe-backend flashinfer_trtllm ({said})"
            ) from error
        if said.startswith(_ACTIVATIONS):
            raise RefusedError(
                "vLLM's class for Muse Spark runs this GPU's NVFP4 kernel on activations in NVFP4, "
                "and this checkpoint's stay floats. Quantize the original again with: nvfp4-moe "
                f"quantize SOURCE TARGET --calibrate TEXT ({said})"
            ) from error
        raise
