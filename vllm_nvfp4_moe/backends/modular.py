"""What methods on GPUs share: vLLM's modular kernel, an experts class between two steps that move
tokens to their experts' ranks and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config

from vllm_nvfp4_moe import compat
from vllm_nvfp4_moe.method import NvFp4MoEMethod

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.config import NvFp4MoEConfig


class ModularMethod(NvFp4MoEMethod):
    """``prepare`` sets ``moe_kernel``."""

    def __init__(self, config: NvFp4MoEConfig, layer: RoutedExperts, weight_only: bool) -> None:
        super().__init__(config, layer, weight_only)
        compat.avoid_frozen_attention(get_current_vllm_config())

    @property
    def supports_eplb(self) -> bool:
        return True

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> Any:
        assert self.moe_kernel is not None
        return self.moe_kernel.apply(
            x,
            layer.w13_weight,
            layer.w2_weight,
            topk_weights,
            topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
