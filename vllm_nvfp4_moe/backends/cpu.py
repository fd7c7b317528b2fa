"""NVFP4 experts on a CPU: weights stay 4-bit in memory, only routed experts are touched.

With few tokens an expert, decoding is the work, and ``cpu_numba`` does everything. With many, the
matrix product is: each routed expert's weights are expanded, used once, and dropped. An E2M1 value
times an E4M3 scale has at most five significant bits, so it is exact in bfloat16; the global scale
multiplies the product, in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from quantize.gates import Gate
from quantize.nvfp4 import BLOCK, decode
from vllm_nvfp4_moe import compat
from vllm_nvfp4_moe.backends import cpu_numba
from vllm_nvfp4_moe.method import NvFp4MoEMethod

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


MANY = 24
"""Tokens an expert, on average, from which a matrix product is faster than ``cpu_numba``'s loops
(measured with m3-nano's shapes on a Zen 5 core)."""


def expand(packed: torch.Tensor, block_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes times block scales, exactly.

    Args:
        packed: uint8 ``[out, in / 2]``.
        block_scale: float8_e4m3fn ``[out, in / 16]``.

    Returns:
        ``[out, in]`` in ``dtype``.
    """
    blocks = decode(packed).to(dtype).unflatten(-1, (-1, BLOCK))
    return (blocks * block_scale.to(dtype).unsqueeze(-1)).flatten(-2)


def _expand(packed: torch.Tensor, block_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bfloat16:
        return cpu_numba.expand(packed, block_scale)
    return expand(packed, block_scale, dtype)


def experts_forward(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_global: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_global: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    form: str,
    alpha: float,
    beta: float,
    limit: float | None,
    weight_on_input: bool,
) -> torch.Tensor:
    """Routed experts' output ``[tokens, hidden]``, in x's dtype.

    Args:
        x: ``[tokens, hidden]``.
        w13, w13_scale, w13_global: see ``vllm_nvfp4_moe.method``; global scale ``[experts]``.
        w2, w2_scale, w2_global: likewise.
        topk_weights: float32 ``[tokens, k]``.
        topk_ids: int32 ``[tokens, k]``, global expert numbers.
        expert_map: int32 ``[global experts]`` to local ones, -1 for other ranks'; None if equal.
        form, alpha, beta, limit: the gate.
        weight_on_input: multiply by the router's weight before the experts instead of after.
    """
    gate = Gate(form, alpha, beta, limit)
    ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
    weights = topk_weights.float()
    dtype = x.dtype
    if dtype == torch.float16:
        # Before the global scale a weight may be 2688, and sums of those leave float16's range.
        x = x.float()
    routed = [expert for expert in ids.unique().tolist() if expert >= 0]
    if ids.numel() <= MANY * len(routed):
        few = cpu_numba.forward(
            x, w13, w13_scale, w13_global, w2, w2_scale, w2_global, weights, ids, gate,
            weight_on_input,
        )  # fmt: skip
        return few.to(dtype)
    output = torch.zeros(x.shape, dtype=torch.float32)
    for expert in routed:
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        factor = weights[tokens, slots].unsqueeze(1)
        inputs = x[tokens]
        if weight_on_input:
            inputs = inputs * factor.to(x.dtype)
        hidden = inputs @ _expand(w13[expert], w13_scale[expert], inputs.dtype).T
        middle = gate.apply_stacked(hidden.float() * w13_global[expert]).to(x.dtype)
        result = (middle @ _expand(w2[expert], w2_scale[expert], x.dtype).T).float()
        result *= w2_global[expert] if weight_on_input else w2_global[expert] * factor
        output.index_add_(0, tokens, result)
    return output.to(dtype)


_LIBRARY = torch.library.Library("vllm_nvfp4_moe", "FRAGMENT")


def _register_op() -> None:
    # Opaque to torch.compile: vLLM-CPU traces through the MoE layer, and this is data-dependent.
    if not hasattr(torch.ops.vllm_nvfp4_moe, "cpu_experts"):
        direct_register_custom_op(
            "cpu_experts",
            experts_forward,
            fake_impl=_fake,
            target_lib=_LIBRARY,
            dispatch_key="CPU",
        )


def _fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    """The result's shape and dtype, for tracing."""
    return torch.empty_like(x)


class CpuMethod(NvFp4MoEMethod):
    """See the module's docstring."""

    @classmethod
    def unsupported(cls, layer: RoutedExperts) -> str | None:
        return None if current_platform.is_cpu() else "the platform is not a CPU"

    @property
    def kernel(self) -> str:
        return "the CPU kernel"

    def prepare(self, layer: RoutedExperts) -> None:
        _register_op()
        compat.use_grouped_routing(layer)
        layer.w13_weight_scale_2 = torch.nn.Parameter(
            layer.w13_weight_scale_2.data[:, 0].contiguous(), requires_grad=False
        )
        # Compile (or load from numba's cache) now, not in the first request. All tokens go to one
        # expert, so that the second size is just enough for the other path.
        for tokens in (1, 1 + MANY):
            x = torch.zeros(tokens, layer.hidden_size, dtype=layer.params_dtype)
            ids = torch.zeros(tokens, 1, dtype=torch.int32)
            self.apply(layer, x, torch.zeros(tokens, 1, dtype=torch.float32), ids, None, None)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None  # no modular kernel here

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        gate = self.gate
        return torch.ops.vllm_nvfp4_moe.cpu_experts(
            x,
            layer.w13_weight,
            layer.w13_weight_scale,
            layer.w13_weight_scale_2,
            layer.w2_weight,
            layer.w2_weight_scale,
            layer.w2_weight_scale_2,
            topk_weights,
            topk_ids,
            layer.expert_map,
            gate.form,
            gate.alpha,
            gate.beta,
            gate.limit,
            layer.apply_router_weight_on_input,
        )
