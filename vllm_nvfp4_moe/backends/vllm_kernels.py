"""vLLM's own NVFP4 kernels on GPUs, chosen by vLLM's own rules among those that apply the gate.

The method is vLLM's ``ModelOptNvFp4FusedMoE``, with three differences: the gate is the contract's,
the weights have been checked, and kernels that would apply another gate are not chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

import torch
from vllm.config.kernel import MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import (
    NvFp4MoeBackend,
    convert_to_nvfp4_moe_kernel_format,
    is_global_sf_supported_for_nvfp4_backend,
    map_nvfp4_backend,
)
from vllm.model_executor.layers.quantization.utils.flashinfer_utils import (
    trtllm_nvfp4_hidden_alignment,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kNvfp4Dynamic,
    kNvfp4DynamicToken,
    kNvfp4Static,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.backends.bias_support import marlin_w2_bias, marlin_w13_bias
from vllm_nvfp4_moe.backends.gpu import GpuMethod
from vllm_nvfp4_moe.backends.padding import pad_only_what_needs_it
from vllm_nvfp4_moe.backends.router_weight_support import weighed
from vllm_nvfp4_moe.backends.selection import select
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.loading.tensors import EXPERT_TENSORS

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts

    from vllm_nvfp4_moe.context import ModelContext
    from vllm_nvfp4_moe.measured import Table
    from vllm_nvfp4_moe.method import NvFp4MoEMethod

_WEIGHT_ONLY = (NvFp4MoeBackend.MARLIN, NvFp4MoeBackend.HUMMING)
"""Backends that take activations as they are, whatever the checkpoint asks for."""

_BY_EXPERT = (NvFp4MoeBackend.VLLM_CUTLASS, NvFp4MoeBackend.B12X)
"""Backends that take each expert's own input scale. The others that take any get the largest."""

_FOUR_OVER_SIX = (NvFp4MoeBackend.FLASHINFER_CUTLASS,)
"""Backends that read FlashInfer's variable where they round the second product's inputs. With a
scale for each token, TRT-LLM's kernel does so for both products' (flashinfer-python 0.7.2)."""

_EIGHT_BITS = {
    NvFp4MoeBackend.HUMMING: settings.humming_input,
    NvFp4MoeBackend.MARLIN: settings.marlin_input,
}
"""By backend, the setting by which users have its activations quantized all the same."""


@cache
def backend_names() -> dict[str, NvFp4MoeBackend]:
    """The values of ``--moe-backend`` that are for NVFP4, and the backends that they mean."""
    found = {}
    for name in get_args(MoEBackend):
        with suppress(ValueError):
            found[name] = map_nvfp4_backend(name)
    return found


class VllmKernelsMethod(GpuMethod):
    """See the module's docstring.

    Attributes:
        nvfp4_backend: vLLM's name of the kernels; under this name vLLM's method looks for it.
        experts_cls: vLLM's class that runs them.
    """

    takes_per_token = True

    def __init__(self, context: ModelContext, layer: RoutedExperts, weight_only: bool) -> None:
        super().__init__(context, layer, weight_only)
        self.per_token_activation = context.format.per_token
        if self.per_token_activation and settings.activations_stay():
            raise ValueError(
                f"{settings.ACTIVATIONS}={settings.BF16} and 'nvfp4_per_token' in "
                "--quantization-config contradict each other; leave one out"
            )
        key = None if self.use_a16 else kNvfp4Dynamic
        if self.per_token_activation:
            key = kNvfp4DynamicToken
        weighs_input = layer.apply_router_weight_on_input
        selection = select(self.moe, kNvfp4Static, key, self.gate, weighs_input)
        self.nvfp4_backend, self.experts_cls = selection.backend, selection.experts_cls
        if self.per_token_activation and self.nvfp4_backend != NvFp4MoeBackend.FLASHINFER_TRTLLM:
            raise ValueError(
                f"{layer.layer_name}: vLLM takes 'nvfp4_per_token' with checkpoints on "
                f"FLASHINFER_TRTLLM alone, and {self.kernel} would run here; leave it out of "
                "--quantization-config"
            )
        self.passed_over = selection.passed_over
        self.input_scales_by_expert = self.nvfp4_backend in _BY_EXPERT
        self.global_input_scales = is_global_sf_supported_for_nvfp4_backend(self.nvfp4_backend)

    @property
    def use_a16(self) -> bool:
        """What vLLM's method calls activations that are to stay as they are."""
        stay = self.weight_only or settings.activations_stay()
        return stay and not self.per_token_activation

    @classmethod
    def unsupported(cls, layer: RoutedExperts) -> str | None:
        if current_platform.is_cpu():
            return "the platform is a CPU"
        if layer.moe_config.has_bias and layer.apply_router_weight_on_input:
            return "the router's weights are for the input of experts with biases"
        if layer.apply_router_weight_on_input and layer.top_k > 1:
            return "the router's weights are for the input, and a token has several experts"
        return None

    @classmethod
    def kernel_names(cls) -> Iterable[str]:
        return list(backend_names())

    @classmethod
    def measured_best(
        cls, name: str, table: Table, context: ModelContext, layer: RoutedExperts, weight_only: bool
    ) -> NvFp4MoEMethod | None:
        config = layer.moe_config
        try:
            config.moe_backend = name  # as if the user had asked for it
            return super().measured_best(name, table, context, layer, weight_only)
        except ValueError:
            return None
        finally:
            config.moe_backend = "auto"

    @property
    def kernel(self) -> str:
        told = [self.experts_cls.__name__]
        if self.per_token_activation:
            told.append("a scale for each token")
        four_over_six = self.per_token_activation or self.nvfp4_backend in _FOUR_OVER_SIX
        if four_over_six and settings.four_over_six():
            told.append("four over six")
        return f"{self.nvfp4_backend.value} ({', '.join(told)})"

    @property
    def quantizes_activations(self) -> bool:
        return not self.use_a16 and self.nvfp4_backend not in _WEIGHT_ONLY

    @property
    def activation_bits(self) -> int:
        setting = _EIGHT_BITS.get(self.nvfp4_backend)
        return 8 if setting is not None and setting() else super().activation_bits

    def prepare(self, layer: RoutedExperts) -> None:
        if self.input_scales_by_expert and self.moe.moe_parallel_config.enable_eplb:
            self._refuse_input_scales_that_stay(layer)
        a13_scale, a2_scale = (getattr(layer, f"{w}_input_scale", None) for w in ("w13", "w2"))
        if self.per_token_activation:  # the kernel's own are relative to these
            a13_scale, a2_scale = layer.w2_weight_scale_2.new_ones(2, layer.num_experts)
        humming = self.nvfp4_backend == NvFp4MoeBackend.HUMMING
        with pad_only_what_needs_it() if humming else nullcontext():
            converted = convert_to_nvfp4_moe_kernel_format(
                nvfp4_backend=self.nvfp4_backend,
                layer=layer,
                w13=layer.w13_weight,
                w13_scale=layer.w13_weight_scale,
                # Gate's and up's are equal by now.
                w13_scale_2=layer.w13_weight_scale_2[:, 0].contiguous(),
                a13_scale=a13_scale,
                w2=layer.w2_weight,
                w2_scale=layer.w2_weight_scale,
                w2_scale_2=layer.w2_weight_scale_2,
                a2_scale=a2_scale,
                is_act_and_mul=self.moe.is_act_and_mul,
                use_a16=self.use_a16,
                trtllm_hidden_alignment=trtllm_nvfp4_hidden_alignment(
                    self.per_token_activation, self.moe.is_act_and_mul
                ),
            )
        # vLLM returns w13's four tensors, then w2's, in the order of the table.
        names = [
            f"{prefix}_{tensor.canonical}"
            for prefix in ("w13", "w2")
            for tensor in EXPERT_TENSORS.values()
        ]
        for name, tensor in zip(names, converted, strict=True):
            if hasattr(layer, name):
                replace_parameter(layer, name, tensor)
            else:
                setattr(layer, name, tensor)
        if layer.moe_config.has_bias and self.nvfp4_backend == NvFp4MoeBackend.MARLIN:
            # Humming converts them itself.
            rows = layer.w13_weight_scale.shape[-1]  # the scales are [experts, inputs / 16, rows]
            w13_bias = marlin_w13_bias(layer.w13_bias, self.moe.w13_num_shards, rows)
            replace_parameter(layer, "w13_bias", w13_bias)
            w2_bias = marlin_w2_bias(layer.w2_bias, layer.w2_weight_scale_2)
            replace_parameter(layer, "w2_bias", w2_bias)
        self._build_moe_kernel(layer)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        config = super().get_fused_moe_quant_config(layer)
        if hasattr(layer, "w13_bias"):  # vLLM's config for NVFP4 has no arguments for them
            config._w1.bias, config._w2.bias = layer.w13_bias, layer.w2_bias
        return config

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: torch.Tensor | None,
    ) -> Any:
        if not layer.apply_router_weight_on_input:
            return super().apply(
                layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input
            )
        assert self.moe_kernel is not None
        x, ones = weighed(x, topk_weights)
        return self.moe_kernel.apply(
            x,
            layer.w13_weight,
            layer.w2_weight,
            ones,
            topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=False,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> Any:
        table = getattr(layer, "hash_indices_table", None)  # since vLLM 0.33
        if table is None:
            return super().apply_monolithic(layer, x, router_logits, input_ids)
        # Tokens choose experts by their numbers. vLLM's method for NVFP4 hands over neither; a
        # kernel that routes by itself would go by the logits.
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
            input_ids=input_ids,
            hash_indices_table=table,
        )

    def _refuse_input_scales_that_stay(self, layer: RoutedExperts) -> None:
        # vLLM 0.32's kernel folds input scales into global scales, which load balancing moves to
        # other places and ranks. It also keeps the input scales themselves, which are not moved.
        for name in ("w13_input_scale", "w2_input_scale"):
            scales = getattr(layer, name, None)
            if scales is not None and torch.unique(scales).numel() > 1:
                raise RefusedError(
                    f"{layer.layer_name}: {name} differs between experts, and with "
                    f"{self.kernel} --enable-eplb would mix them up; use another --moe-backend"
                )
