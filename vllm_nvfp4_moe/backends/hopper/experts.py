"""A Hopper kernel as one of vLLM's experts classes: vLLM moves tokens to their experts' ranks and
back, and calls it in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm import platforms
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Static

from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.kernels.hopper.bf16_weights import GROUP_ROWS
from vllm_nvfp4_moe.kernels.hopper.kernel import Experts

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        FusedMoEQuantConfig,
    )
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey

    from quantize.experts.gates import Gate
    from vllm_nvfp4_moe.kernels.hopper.kernel import HopperKernel
    from vllm_nvfp4_moe.kernels.hopper.launch import TileShape

CAPABILITY = (9, 0)

ACTIVATIONS = (
    MoEActivation.SILU,
    MoEActivation.SWIGLUOAI_UNINTERLEAVE,
    MoEActivation.GELU_TANH,
    MoEActivation.RELU2_NO_MUL,
)
"""vLLM's names of the activations that the kernels have (``FORMS`` in launch.py)."""

DISPATCHES = (
    "allgather_reducescatter",
    "deepep_high_throughput",
    "deepep_v2",
    "flashinfer_nvlink_one_sided",
)
"""vLLM's ways to bring tokens to other ranks that give what the kernels take, as their code says:
rows of tokens, and expert numbers that are -1 or below the number of all experts. Other ways give
batches by expert (deepep_low_latency, nixl_ep, moonep), give numbers beyond that
(flashinfer_nvlink_two_sided), or are for other hardware."""


def capability() -> tuple[int, int] | None:
    """The device's compute capability; None if it is not an NVIDIA GPU."""
    platform = platforms.current_platform
    found = platform.get_device_capability() if platform.is_cuda() else None
    return None if found is None else (found.major, found.minor)


class HopperExperts(mk.FusedMoEExpertsModular):
    """Runs a layer's experts, applies the router's weights and adds up each token's experts.

    Args:
        layer: after ``HopperMethod.prepare``. Global scales and biases are read from it in each
            call, since vLLM's reloading puts its parameters of the first load back after
            ``prepare``.
        gate: the contract's. vLLM's name for it, which calls bring, has no numbers.
        kernel: the one that the layer's weights are packed for.

    Attributes:
        tile_shape: the one to take, for the self-check; None for the fastest.
    """

    tile_shape: TileShape | None = None

    @property
    def post_gemm2_hook(self) -> None:
        """What vLLM 0.33 has experts classes call between the second GEMM and the router's weights:
        nothing here."""
        return None

    @post_gemm2_hook.setter
    def post_gemm2_hook(self, hook: Any) -> None:
        if hook is not None:
            raise RefusedError(
                f"{self.layer.layer_name}: the model changes each expert's output before the "
                "router's weights are applied, which the Hopper kernel does not do; set "
                f"{settings.HOPPER}=0"
            )

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: FusedMoEQuantConfig,
        layer: RoutedExperts,
        gate: Gate,
        kernel: HopperKernel,
    ) -> None:
        super().__init__(moe_config, quant_config)
        self.layer, self.gate, self.kernel = layer, gate, kernel

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def _supports_current_device() -> bool:
        return capability() == CAPABILITY

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(
        weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return weight_key == kNvfp4Static

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        # Experts dispatch for themselves then, whether or not tokens travel.
        if moe_parallel_config.use_passthrough_all2all:
            return False
        return (
            not moe_parallel_config.use_all2all_kernels
            or moe_parallel_config.all2all_backend in DISPATCHES
        )

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def moe_problem_size(
        self, a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[int, int, int, int, int]:
        """vLLM's E, M, N, K and top k: N are the rows of w13 with padding."""
        tokens, hidden = a1.shape
        rows = w1.shape[1] * GROUP_ROWS
        return w1.shape[0], tokens, rows, hidden, topk_ids.shape[1]

    def workspace_shapes(
        self, tokens: int, rows: int, hidden: int, *_: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """None of vLLM's workspace is used: the kernels take their own, of other dtypes."""
        return (0,), (0,), (tokens, hidden)

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Write the experts' sum to ``output``, bf16 ``[tokens, hidden]``.

        Args:
            hidden_states: bf16 ``[tokens, hidden]``.
            w1, w2: packed, the layer's.
            topk_weights: ``[tokens, k]``, the router's.
            topk_ids: integers ``[tokens, k]``: global expert numbers, -1 for none.
            expert_map: this rank's number of each expert, -1 for those of other ranks; None if it
                has all.
        """
        x = hidden_states
        if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        experts = Experts(
            w1,
            w2,
            self.layer.w13_weight_scale_2,
            self.layer.w2_weight_scale_2,
            self.moe_config.hidden_dim,
            getattr(self.layer, "w13_bias", None),
            getattr(self.layer, "w2_bias", None),
            self.gate.gated,
        )
        self.kernel.run(
            x,
            experts,
            topk_ids.to(torch.int32).contiguous(),
            topk_weights.float().contiguous(),
            self.gate,
            local=expert_map,
            out=output,
            tile_shape=self.tile_shape,
        )
