"""vLLM's own NVFP4 kernels on GPUs, chosen by vLLM's own oracle among those that apply the gate.

The sequence of calls is that of vLLM 0.32's ``ModelOptNvFp4FusedMoE``; what differs comes before:
the gate is the contract's, and the weights have been checked.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import (
    NvFp4MoeBackend,
    convert_to_nvfp4_moe_kernel_format,
    is_global_sf_supported_for_nvfp4_backend,
    make_nvfp4_moe_kernel,
    make_nvfp4_moe_quant_config,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from vllm_nvfp4_moe import compat
from vllm_nvfp4_moe.backends.modular import ModularMethod
from vllm_nvfp4_moe.backends.selection import select
from vllm_nvfp4_moe.checks import RefusedError
from vllm_nvfp4_moe.method import CANONICAL

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.config import NvFp4MoEConfig


_WEIGHT_ONLY = (NvFp4MoeBackend.MARLIN, NvFp4MoeBackend.HUMMING)
"""Backends that take activations as they are, whatever the checkpoint asks for."""


_EIGHT_BITS = {
    NvFp4MoeBackend.HUMMING: "VLLM_HUMMING_INPUT_QUANT_CONFIG",
    NvFp4MoeBackend.MARLIN: "VLLM_MARLIN_INPUT_DTYPE",
}
"""vLLM's environment variables by which users have activations quantized all the same."""


class VllmKernelsMethod(ModularMethod):
    """See the module's docstring."""

    def __init__(self, config: NvFp4MoEConfig, layer: RoutedExperts, weight_only: bool) -> None:
        super().__init__(config, layer, weight_only)
        selection = select(
            self.moe, kNvfp4Static, None if self.weight_only else kNvfp4Dynamic, self.gate
        )
        self.backend, self.experts_cls = selection.backend, selection.experts_cls
        self.passed_over = selection.passed_over
        self.input_scales_by_expert = self.backend == NvFp4MoeBackend.VLLM_CUTLASS
        self.global_input_scales = is_global_sf_supported_for_nvfp4_backend(self.backend)

    @classmethod
    def unsupported(cls, layer: RoutedExperts) -> str | None:
        return "the platform is a CPU" if current_platform.is_cpu() else None

    @property
    def kernel(self) -> str:
        return f"{self.backend.value} ({self.experts_cls.__name__})"

    @property
    def quantizes_activations(self) -> bool:
        return not self.weight_only and self.backend not in _WEIGHT_ONLY

    @property
    def activation_bits(self) -> int:
        if os.environ.get(_EIGHT_BITS.get(self.backend, "")):
            return 8
        return super().activation_bits

    def prepare(self, layer: RoutedExperts) -> None:
        compat.route_with_float32_bias(layer)
        if self.input_scales_by_expert and self.moe.moe_parallel_config.enable_eplb:
            self._refuse_input_scales_that_stay(layer)
        humming = self.backend == NvFp4MoeBackend.HUMMING
        with compat.pad_only_what_needs_it() if humming else nullcontext():
            converted = convert_to_nvfp4_moe_kernel_format(
                nvfp4_backend=self.backend,
                layer=layer,
                w13=layer.w13_weight,
                w13_scale=layer.w13_weight_scale,
                # Gate's and up's are equal by now.
                w13_scale_2=layer.w13_weight_scale_2[:, 0].contiguous(),
                a13_scale=getattr(layer, "w13_input_scale", None),
                w2=layer.w2_weight,
                w2_scale=layer.w2_weight_scale,
                w2_scale_2=layer.w2_weight_scale_2,
                a2_scale=getattr(layer, "w2_input_scale", None),
                is_act_and_mul=self.moe.is_act_and_mul,
                use_a16=self.weight_only,
            )
        for i, tensor in enumerate(converted):
            name = f"{'w13' if i < 4 else 'w2'}_{CANONICAL[i % 4]}"
            if hasattr(layer, name):
                replace_parameter(layer, name, tensor)
            else:
                setattr(layer, name, tensor)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = make_nvfp4_moe_kernel(
            moe_quant_config=self.moe_quant_config,
            moe_config=self.moe,
            experts_cls=self.experts_cls,
            backend=self.backend,
            routing_tables=layer._expert_routing_tables(),
        )
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    def _refuse_input_scales_that_stay(self, layer: RoutedExperts) -> None:
        # vLLM 0.32's kernel folds them into global scales, which load balancing moves to other
        # places and ranks, and keeps them itself, where they stay.
        for name in ("w13_input_scale", "w2_input_scale"):
            scales = getattr(layer, name, None)
            if scales is not None and torch.unique(scales).numel() > 1:
                raise RefusedError(
                    f"{layer.layer_name}: {name} differs between experts, and with "
                    f"{self.kernel} --enable-eplb would mix them up; use another --moe-backend"
                )

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return make_nvfp4_moe_quant_config(
            backend=self.backend,
            w13_scale=layer.w13_weight_scale,
            w2_scale=layer.w2_weight_scale,
            w13_scale_2=layer.w13_weight_scale_2,
            w2_scale_2=layer.w2_weight_scale_2,
            a13_scale=layer.w13_input_scale,
            a2_scale=layer.w2_input_scale,
            swiglu_limit=layer.swiglu_limit,
            swiglu_alpha=layer.swiglu_alpha,
            swiglu_beta=layer.swiglu_beta,
            layer=layer,
            use_a16=self.weight_only,
        )

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> Any:
        assert self.moe_kernel is not None
        return self.moe_kernel.apply_monolithic(
            x,
            layer.w13_weight,
            layer.w2_weight,
            router_logits,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            num_expert_group=layer.num_expert_group,
            topk_group=layer.topk_group,
            e_score_correction_bias=layer.e_score_correction_bias,
            routed_scaling_factor=layer.routed_scaling_factor,
            routing_sink=layer.routing_sink,
        )
