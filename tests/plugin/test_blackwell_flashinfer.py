"""That alpha, beta and limit arrive where FlashInfer's kernels read them, under the kernels' names.

Kernels are replaced by recorders with their real parameters; what a kernel computes from them is
written down here from its source, and must be the gate.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from quantize.experts.gates import Gate
from tests.plugin.blackwell import (
    ACTIVATION,
    FUSED_MOE,
    GELU,
    GELU_TANH,
    SILU,
    FlashInferActivation,
    pretend_flashinfer,
)
from tests.plugin.blackwell_layer import (
    EXPERTS,
    HIDDEN,
    NUMBERED,
    SITU_UNCAPPED,
    SOFT,
    TOKENS,
    UNLIMITED,
    applied,
    experts_of,
    run,
)

# Parameters of flashinfer-python 0.7.0.post1, the version that vLLM 0.32 asks for. 0.7.2.post1, for
# which 0.33 asks, has all of them under the same names, and more for other purposes.
_TRTLLM = """hidden_states hidden_states_scale gemm1_weights gemm1_weights_scale gemm1_bias
    gemm1_alpha gemm1_beta gemm1_clamp_limit gemm2_weights gemm2_weights_scale gemm2_bias
    output1_scale_scalar output1_scale_gate_scalar output2_scale_scalar num_experts top_k n_group
    topk_group intermediate_size local_expert_offset local_num_experts routed_scaling_factor
    routing_method_type do_finalize enable_pdl activation_type per_token_scale output
    tune_max_num_tokens num_fused_shared_experts valid_hidden_size valid_intermediate_size
    hidden_states_scale_layout"""
PARAMETERS = {
    # flashinfer/fused_moe/core.py:6164, :6435, :1262; in 0.7.2.post1 :6330, :6606, :1277
    "trtllm_fp4_block_scale_moe": f"routing_logits routing_bias {_TRTLLM} norm_topk_prob "
    "routing_replay_out",
    "trtllm_fp4_block_scale_routed_moe": f"topk_ids routing_bias {_TRTLLM} gemm1_lora_delta",
    "cutlass_fused_moe": """input token_selected_experts token_final_scales fc1_expert_weights
        fc2_expert_weights output_dtype quant_scales fc1_expert_biases fc2_expert_biases input_sf
        swiglu_alpha swiglu_beta swiglu_limit tp_size tp_rank ep_size ep_rank cluster_size
        cluster_rank output enable_alltoall use_deepseek_fp8_block_scale use_w4_group_scaling
        use_mxfp8_act_scaling min_latency_mode use_packed_weights use_wfp4afp8_humming
        tune_max_num_tokens enable_pdl activation_type swizzled_input_sf use_fused_finalize
        profile_ids workspace_buffer situ_beta situ_linear_beta""",
    # flashinfer/fused_moe/cute_dsl/fused_moe.py:1384; in 0.7.2.post1 :1865
    "cute_dsl_fused_moe_nvfp4": """x x_sf token_selected_experts token_final_scales w1_weight
        w1_weight_sf w1_alpha fc2_input_scale w2_weight w2_weight_sf w2_alpha num_experts top_k
        num_local_experts local_expert_offset output_dtype use_fused_finalize moe_output aux_stream
        enable_pdl activation_type swiglu_alpha swiglu_beta swiglu_limit situ_beta situ_linear_beta
        quant_mode per_token_scale""",
}


class Recorder:
    """Takes a kernel's parameters and keeps them in ``seen``; any other is a TypeError."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.seen: dict[str, Any] = {}

    def __call__(self, **arguments: Any) -> torch.Tensor:
        unknown = set(arguments) - set(PARAMETERS[self.kernel].split())
        if unknown:
            raise TypeError(f"{self.kernel} has no {unknown}")
        self.seen = arguments
        return torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and ups, far enough to be clamped."""
    points = torch.linspace(-12, 12, 49, dtype=torch.float64)
    return torch.meshgrid(points, points, indexing="ij")


def trtllm(monkeypatch: pytest.MonkeyPatch, name: str, kernel: str, gate: Gate) -> Recorder:
    flashinfer = pretend_flashinfer(monkeypatch)
    recorder = Recorder(kernel)
    setattr(flashinfer.fused_moe, kernel, recorder)
    module = importlib.import_module(f"{FUSED_MOE}.experts.trtllm_nvfp4_moe")
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: "cpu")
    experts = experts_of("FLASHINFER_TRTLLM", getattr(module, name), gate)
    if name.endswith("Modular"):
        run(experts, gate)
        return recorder
    experts.apply(
        hidden_states=torch.zeros(TOKENS, HIDDEN // 2, dtype=torch.uint8),
        w1=experts.layer.w13_weight,
        w2=experts.layer.w2_weight,
        router_logits=torch.zeros(TOKENS, EXPERTS),
        activation=ACTIVATION[gate.form],
        global_num_experts=EXPERTS,
        expert_map=None,
        a1q_scale=torch.zeros(TOKENS, HIDDEN // 16).to(torch.float8_e4m3fn),
        apply_router_weight_on_input=False,
    )
    return recorder


TRTLLM_CLASSES = {
    "TrtLlmNvFp4ExpertsModular": "trtllm_fp4_block_scale_routed_moe",
    "TrtLlmNvFp4ExpertsMonolithic": "trtllm_fp4_block_scale_moe",
}


@pytest.mark.parametrize("name", TRTLLM_CLASSES)
@pytest.mark.parametrize("gate", [*NUMBERED, UNLIMITED], ids=str)
def test_trtllm(monkeypatch: pytest.MonkeyPatch, name: str, gate: Gate) -> None:
    """What the kernel computes from the GEMM's raw sums (FlashInfer's KernelRunner.h:35) is the
    gate, over the scale by which its output is quantized."""
    seen = trtllm(monkeypatch, name, TRTLLM_CLASSES[name], gate).seen
    assert seen["activation_type"] == FlashInferActivation.Swiglu
    g, u = grid()
    for expert, weight_scale in enumerate((0.5, 0.02, 3.0, 0.125)):
        to_real = weight_scale * 0.25  # a raw sum's value: global scale times input scale
        raw_g, raw_u = g / to_real, u / to_real
        limit = seen["gemm1_clamp_limit"]
        if limit is not None:
            bound = float(limit[expert])
            raw_g, raw_u = raw_g.clamp(max=bound), raw_u.clamp(-bound, bound)
        scale_gate = float(seen["output1_scale_gate_scalar"][expert])
        alpha, beta = (float(seen[f"gemm1_{n}"][expert]) for n in ("alpha", "beta"))
        x1 = raw_g * scale_gate
        got = float(seen["output1_scale_scalar"][expert]) * (raw_u + beta)
        got = got * x1 * torch.sigmoid(alpha * x1)
        torch.testing.assert_close(got, applied(gate, g, u) / 0.5, rtol=1e-5, atol=1e-5)
    assert (limit is None) == (gate.limit is None)


@pytest.mark.parametrize("name", TRTLLM_CLASSES)
@pytest.mark.parametrize("gate", SOFT, ids=str)
def test_trtllm_situ(monkeypatch: pytest.MonkeyPatch, name: str, gate: Gate) -> None:
    """Of values that have their scales (FlashInfer's core.py:6306): up is x0, the gate x1."""
    seen = trtllm(monkeypatch, name, TRTLLM_CLASSES[name], gate).seen
    assert seen["activation_type"] == FlashInferActivation.Situ
    assert seen["gemm1_clamp_limit"] is None
    g, u = grid()
    for expert, weight_scale in enumerate((0.5, 0.02, 3.0, 0.125)):
        to_real = weight_scale * 0.25
        scale = float(seen["output1_scale_gate_scalar"][expert])
        x0, x1 = u / to_real * scale, g / to_real * scale
        alpha, beta = (float(seen[f"gemm1_{n}"][expert]) for n in ("alpha", "beta"))
        got = beta * torch.tanh(x0 / beta) * alpha * torch.tanh(x1 / alpha) * torch.sigmoid(x1)
        got = float(seen["output1_scale_scalar"][expert]) * got
        torch.testing.assert_close(got, applied(gate, g, u) / 0.5, rtol=1e-5, atol=1e-5)


def test_trtllm_has_one_geglu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why exact GELU is withheld from it: vLLM asks for the same thing in both cases."""
    name, kernel = next(iter(TRTLLM_CLASSES.items()))
    asked = [trtllm(monkeypatch, name, kernel, gate).seen for gate in (GELU, GELU_TANH, SILU)]
    geglu = FlashInferActivation.Geglu
    assert [a["activation_type"] for a in asked] == [geglu, geglu, FlashInferActivation.Swiglu]
    for arguments in asked:
        assert all(arguments[f"gemm1_{n}"] is None for n in ("alpha", "beta", "clamp_limit"))


def flashinfer_cutlass(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> dict[str, Any]:
    pretend_flashinfer(monkeypatch)
    module = importlib.import_module(f"{FUSED_MOE}.experts.flashinfer_cutlass_moe")
    recorder = Recorder("cutlass_fused_moe")
    monkeypatch.setattr(module, "flashinfer_cutlass_fused_moe", recorder)
    run(experts_of("FLASHINFER_CUTLASS", module.FlashInferExperts, gate), gate)
    return recorder.seen


@pytest.mark.parametrize("gate", [*NUMBERED, UNLIMITED], ids=str)
def test_flashinfer_cutlass(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """SwigluBiasAdaptor (cutlass_fused_moe_kernels.cuh:2226) takes an expert's three numbers, or
    alpha 1, beta 0, no limit, on values that have their scales. Any of them selects it."""
    seen = flashinfer_cutlass(monkeypatch, gate)
    assert seen["activation_type"] == FlashInferActivation.Swiglu
    for name, number in (("alpha", gate.alpha), ("beta", gate.beta), ("limit", gate.limit)):
        got = seen[f"swiglu_{name}"]
        if number is None:
            assert got is None
        else:
            assert torch.equal(got, torch.full((EXPERTS,), number)) and got.dtype == torch.float32


def test_flashinfer_cutlass_is_asked_for_exact_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why GELU by tanh is withheld from it: its Geglu is exact, GegluTanh is another number
    (cutlass_fused_moe_kernels.cuh:2361). When this fails, vLLM asks for the right one."""
    seen = flashinfer_cutlass(monkeypatch, GELU_TANH)
    assert seen["activation_type"] == FlashInferActivation.Geglu
    silu = flashinfer_cutlass(monkeypatch, SILU)
    assert silu["activation_type"] == FlashInferActivation.Swiglu
    assert all(silu[f"swiglu_{n}"] is None for n in ("alpha", "beta", "limit"))


def cutedsl(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> dict[str, Any]:
    pretend_flashinfer(monkeypatch)
    oracle = importlib.import_module(f"{FUSED_MOE}.oracle.nvfp4")
    monkeypatch.setattr(oracle, "nvfp4_swizzled_scale_to_cutedsl_mma_view", lambda scale: scale)
    module = importlib.import_module(f"{FUSED_MOE}.experts.flashinfer_cutedsl_moe")
    recorder = Recorder("cute_dsl_fused_moe_nvfp4")
    monkeypatch.setattr(module, "flashinfer_cute_dsl_fused_moe_nvfp4", recorder)
    run(experts_of("FLASHINFER_CUTEDSL", module.FlashInferCuteDSLExperts, gate), gate)
    assert recorder.seen["activation_type"] == FlashInferActivation.Swiglu
    return recorder.seen


@pytest.mark.parametrize("gate", [SILU, *NUMBERED, UNLIMITED], ids=str)
def test_cutedsl(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """It takes numbers; left out, they are 1, 0 and float32's largest (tllm_enums.py:102)."""
    seen = cutedsl(monkeypatch, gate)
    default = (1.0, 0.0, torch.finfo(torch.float32).max)
    got = [
        seen.get(f"swiglu_{name}", otherwise)
        for name, otherwise in zip(("alpha", "beta", "limit"), default, strict=True)
    ]
    assert got == [gate.alpha, gate.beta, default[2] if gate.limit is None else gate.limit]
    assert "situ_beta" not in seen


@pytest.mark.parametrize("gate", [*SOFT, SITU_UNCAPPED], ids=str)
def test_cutedsl_situ(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """``situ_beta`` selects SiTU, and no ``situ_linear_beta`` leaves up alone
    (blockscaled_contiguous_gather_grouped_gemm_act_fusion.py:2805-2886)."""
    seen = cutedsl(monkeypatch, gate)
    assert (seen["situ_beta"], seen.get("situ_linear_beta")) == (gate.alpha, gate.limit)
    assert not {"swiglu_alpha", "swiglu_beta", "swiglu_limit"} & set(seen)
