"""Our own kernel for Hopper GPUs (``kernels/hopper_moe.cu``), which keeps activations in bf16.

After ``prepare`` a layer holds

* ``w13_weight``, ``w2_weight`` uint8 ``[experts, row tiles, chunks, bytes]``, codes and block
  scales together (``kernels.hopper_weights``);
* ``w13_weight_scale_2``, ``w2_weight_scale_2`` float32 ``[experts]``

and no input scales. All are parameters with an expert a row, which is what EPLB moves, in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.utils import replace_parameter

from vllm_nvfp4_moe import compat
from vllm_nvfp4_moe.backends import hopper_support
from vllm_nvfp4_moe.backends.hopper_experts import HopperExperts
from vllm_nvfp4_moe.backends.modular import ModularMethod
from vllm_nvfp4_moe.kernels import hopper_weights

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

NAME = "HOPPER (vllm_nvfp4_moe)"


class HopperMethod(ModularMethod):
    """See the module's docstring. ``unsupported`` has built the kernel, so no request does."""

    @classmethod
    def unsupported(cls, layer: RoutedExperts) -> str | None:
        return hopper_support.unsupported(layer)

    @classmethod
    def missed(cls, layer: RoutedExperts) -> str | None:
        return None if hopper_support.elsewhere() or hopper_support.declined(layer) else NAME

    @property
    def kernel(self) -> str:
        return NAME

    def prepare(self, layer: RoutedExperts) -> None:
        compat.route_with_float32_bias(layer)
        for prefix in ("w13", "w2"):
            # One matrix after the other, so that no more than one lies in memory twice.
            packed = hopper_weights.pack_experts(
                getattr(layer, f"{prefix}_weight").data,
                getattr(layer, f"{prefix}_weight_scale").data,
                gated=prefix == "w13",
            )
            delattr(layer, f"{prefix}_weight_scale")
            replace_parameter(layer, f"{prefix}_weight", packed)
            if hasattr(layer, f"{prefix}_input_scale"):
                delattr(layer, f"{prefix}_input_scale")
        # Gate's and up's are equal by now.
        first = layer.w13_weight_scale_2.data[:, 0].contiguous()
        replace_parameter(layer, "w13_weight_scale_2", first)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        steps = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
        )
        experts = HopperExperts(self.moe, self.moe_quant_config, layer, self.gate)
        self.moe_kernel = FusedMoEKernel(steps, experts)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make(quant_dtype=None, weight_dtype="nvfp4")
