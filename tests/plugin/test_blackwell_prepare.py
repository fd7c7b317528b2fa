"""From checked weights to vLLM's kernel object, as on Blackwell: all but the kernel's launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.oracle import nvfp4

from quantize.experts.gates import Gate
from tests.plugin.blackwell import M3, RELU2, moe_config
from tests.plugin.blackwell_layer import EXPERTS as KERNELS_EXPERTS
from tests.plugin.conversions import EXPERTS, Experts, bits, unswizzled
from vllm_nvfp4_moe.backends.vllm_kernels import VllmKernelsMethod


def checked_layer(experts: Experts, config: Any) -> Any:
    """What the plugin's ``prepare`` gets (see vllm_nvfp4_moe/method.py)."""
    layer: Any = torch.nn.Module()
    weights, scales = [experts.up], [bits(experts.up_scale)]
    if config.is_act_and_mul:
        weights, scales = [experts.gate, *weights], [bits(experts.gate_scale), *scales]
    halves = len(weights)
    tensors = {
        "w13_weight": torch.cat(weights, 1),
        "w13_weight_scale": torch.cat(scales, 1).view(torch.float8_e4m3fn),
        "w13_weight_scale_2": experts.w13_global.unsqueeze(1).repeat(1, halves),
        "w13_input_scale": torch.full((EXPERTS, halves), 0.25),
        "w2_weight": experts.down.clone(),
        "w2_weight_scale": experts.down_scale.clone(),
        "w2_weight_scale_2": experts.down_global.clone(),
        "w2_input_scale": torch.full((EXPERTS,), 0.5),
    }
    for name, tensor in tensors.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    layer.activation, layer.moe_config = config.activation, config
    for number in ("swiglu_alpha", "swiglu_beta", "swiglu_limit"):
        setattr(layer, number, getattr(config, number))
    layer._expert_routing_tables = lambda: None
    return layer


@pytest.mark.parametrize("backend", ["VLLM_CUTLASS", "FLASHINFER_CUTLASS", "FLASHINFER_CUTEDSL"])
@pytest.mark.parametrize("gate", [M3, RELU2], ids=str)
def test_prepared_kernel(monkeypatch: pytest.MonkeyPatch, backend: str, gate: Gate) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    # A view for the CuteDSL kernel alone; tests/gpu/test_conversions.py has it.
    monkeypatch.setattr(nvfp4, "nvfp4_swizzled_scale_to_cutedsl_mma_view", lambda scale: scale)
    experts = Experts.random(256, 128)
    method: Any = object.__new__(VllmKernelsMethod)
    method.moe = moe_config(gate, experts=EXPERTS, hidden=256, inner=128)
    method.weight_only = False
    method.nvfp4_backend = nvfp4.NvFp4MoeBackend(backend)
    (method.experts_cls,) = nvfp4.backend_to_kernel_cls(method.nvfp4_backend)
    layer = checked_layer(experts, method.moe)
    with set_current_vllm_config(VllmConfig()):
        method.prepare(layer)

    kernel = method.moe_kernel.fused_experts
    assert type(kernel) is method.experts_cls
    # A product's factor is both operands' global scales; what quantizes an input is its inverse.
    assert torch.equal(kernel.g1_alphas, experts.w13_global * 0.25)
    assert torch.equal(kernel.g2_alphas, experts.down_global * 0.5)
    assert kernel.a1_gscale.tolist() == [4.0] * EXPERTS
    assert kernel.a2_gscale.tolist() == [2.0] * EXPERTS
    # EPLB moves the layer's parameters; the kernel must see them move.
    for seen, name in (
        (kernel.g1_alphas, "w13_weight_scale_2"),
        (kernel.g2_alphas, "w2_weight_scale_2"),
        (kernel.w1_scale, "w13_weight_scale"),
        (kernel.w2_scale, "w2_weight_scale"),
    ):
        assert seen.data_ptr() == getattr(layer, name).data_ptr()
    assert torch.equal(unswizzled(kernel.w2_scale), bits(experts.down_scale))
    if gate == RELU2:
        assert torch.equal(unswizzled(kernel.w1_scale), bits(experts.up_scale))
        assert KERNELS_EXPERTS != EXPERTS  # so that no two tests' layers are taken for each other
        return
    config = kernel.quant_config
    assert (config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit) == (1.702, 1.0, 7.0)
