"""What the methods on GPUs share. Most of it is vLLM's own method for ModelOpt's NVFP4 experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4FusedMoE

from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.method import NvFp4MoEMethod

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.context import ModelContext


class GpuMethod(NvFp4MoEMethod, ModelOptNvFp4FusedMoE):
    """Runs vLLM's kernel object: an experts class between two steps, which move tokens to their
    experts' ranks and back.

    A subclass's ``prepare`` sets ``moe_kernel``. What calls that kernel (``apply``,
    ``apply_monolithic``) is inherited from vLLM, and so is ``supports_eplb``. Creating, loading and
    checking weights is done by :class:`NvFp4MoEMethod`, which comes first. vLLM's constructor does
    not run.
    """

    supports_pre_processed_weights = False
    """vLLM's method can take weights that were converted before; those were never checked here."""

    def __init__(self, context: ModelContext, layer: RoutedExperts, weight_only: bool) -> None:
        super().__init__(context, layer, weight_only)
        quirks.avoid_frozen_attention(get_current_vllm_config())

    def prepare_router(self, layer: RoutedExperts) -> None:
        quirks.route_with_float32_bias(layer)
