"""Our own kernels for Hopper GPUs: with activations in bf16 (``kernels/hopper_moe.cu``), or in FP8
for who asks for that (``kernels/hopper_fp8.cu``).

After ``prepare`` a layer holds

* ``w13_weight``, ``w2_weight`` uint8 ``[experts, row tiles, chunks or stages, bytes]``, codes and
  block scales together (``kernels.hopper_weights``, ``kernels.hopper_fp8_weights``);
* ``w13_weight_scale_2``, ``w2_weight_scale_2`` float32 ``[experts]``

and no input scales. All are parameters with an expert a row, which is what EPLB moves, in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.utils import replace_parameter

from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.backends import hopper_support, hopper_variants
from vllm_nvfp4_moe.backends.gpu import GpuMethod
from vllm_nvfp4_moe.backends.hopper_experts import HopperExperts

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.context import ModelContext


class HopperMethod(GpuMethod):
    """See the module's docstring. ``unsupported`` has built the kernel, so no request does."""

    def __init__(self, context: ModelContext, layer: RoutedExperts, weight_only: bool) -> None:
        super().__init__(context, layer, weight_only)
        self.variant = hopper_variants.VARIANTS[hopper_variants.asked()]

    @classmethod
    def unsupported(cls, layer: RoutedExperts) -> str | None:
        return hopper_support.unsupported(layer)

    @classmethod
    def missed(cls, layer: RoutedExperts) -> str | None:
        if hopper_support.elsewhere() or hopper_support.declined(layer):
            return None
        return hopper_variants.VARIANTS[hopper_variants.asked()].name

    @property
    def kernel(self) -> str:
        return self.variant.name

    @property
    def activation_bits(self) -> int:
        return self.variant.bits

    @property
    def rounds_weights(self) -> bool:
        return self.variant.bits < 16

    def prepare(self, layer: RoutedExperts) -> None:
        quirks.route_with_float32_bias(layer)
        for prefix in ("w13", "w2"):
            # One matrix after the other, so that no more than one lies in memory twice.
            global_scales = getattr(layer, f"{prefix}_weight_scale_2").data
            packed, global_scales = self.variant.kernels.Experts.matrix(
                getattr(layer, f"{prefix}_weight").data,
                getattr(layer, f"{prefix}_weight_scale").data,
                # Gate's and up's are equal by now.
                global_scales[:, 0] if prefix == "w13" else global_scales,
                gated=prefix == "w13",
            )
            delattr(layer, f"{prefix}_weight_scale")
            replace_parameter(layer, f"{prefix}_weight", packed)
            replace_parameter(layer, f"{prefix}_weight_scale_2", global_scales)
            if hasattr(layer, f"{prefix}_input_scale"):
                delattr(layer, f"{prefix}_input_scale")
            # What was freed is a little smaller than the next layer's packed matrix: PyTorch would
            # keep it and take as much again from the driver.
            torch.cuda.empty_cache()
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        steps = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
        )
        experts = HopperExperts(
            self.moe, self.moe_quant_config, layer, self.gate, self.variant.kernels
        )
        self.moe_kernel = FusedMoEKernel(steps, experts)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make(quant_dtype=None, weight_dtype="nvfp4")
