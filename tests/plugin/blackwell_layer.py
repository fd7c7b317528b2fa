"""A loaded layer for a kernel's class, and the call that vLLM's modular kernel makes of it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

from quantize.experts.gates import Gate
from tests.plugin.blackwell import ACTIVATION, M3, SITU, moe_config
from vllm_nvfp4_moe.backends.vllm_kernels import VllmKernelsMethod

EXPERTS, HIDDEN, INNER, TOKENS, TOPK = 4, 256, 128, 3, 4

OTHER = Gate("swiglu_oai", alpha=1.3, beta=0.5, limit=3.0)
CLAMPED_SILU = Gate("swiglu_oai", alpha=1.0, beta=0.0, limit=10.0)
UNLIMITED = Gate("swiglu_oai", alpha=1.702, beta=1.0)
NUMBERED = (M3, OTHER, CLAMPED_SILU)
SITU_OTHER = Gate("situ", alpha=2.0, limit=10.0)
SITU_UNCAPPED = Gate("situ", alpha=1.5)
SOFT = (SITU, SITU_OTHER)


def applied(gate: Gate, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``swiglu_oai`` and ``situ``, as docs/users/families.md has them."""
    if gate.form == "situ":
        up = u if gate.limit is None else gate.limit * torch.tanh(u / gate.limit)
        return gate.alpha * torch.tanh(g / gate.alpha) / (1 + torch.exp(-g)) * up
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return (u + gate.beta) * g / (1 + torch.exp(-gate.alpha * g))


def layer_of(gate: Gate) -> Any:
    """A layer as ``prepare`` leaves it: converted, global and input scales one an expert."""
    layer: Any = torch.nn.Module()
    if gate.form == "swiglu_oai":
        layer.swiglu_alpha, layer.swiglu_beta, layer.swiglu_limit = (
            gate.alpha,
            gate.beta,
            gate.limit,
        )
    else:
        layer.swiglu_alpha = layer.swiglu_beta = layer.swiglu_limit = None
    shapes = {"w13": ((1 + gate.gated) * INNER, HIDDEN), "w2": (HIDDEN, INNER)}
    for name, (rows, columns) in shapes.items():
        tensors = {
            "weight": torch.zeros(EXPERTS, rows, columns // 2, dtype=torch.uint8),
            "weight_scale": torch.zeros(EXPERTS, rows, columns // 16).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor([0.5, 0.02, 3.0, 0.125]),
            "input_scale": torch.full((EXPERTS,), 0.25 if name == "w13" else 0.5),
        }
        for suffix, tensor in tensors.items():
            parameter = torch.nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(f"{name}_{suffix}", parameter)
    return layer


def quant_config_of(backend: str, layer: Any) -> Any:
    """vLLM's config for a kernel, as the plugin's method makes it."""
    method: Any = object.__new__(VllmKernelsMethod)
    method.nvfp4_backend, method.weight_only = NvFp4MoeBackend(backend), backend == "MARLIN"
    return method.get_fused_moe_quant_config(layer)


def experts_of(backend: str, experts_cls: Any, gate: Gate) -> Any:
    """vLLM's class with the config that the plugin's method gives it, after loading."""
    layer = layer_of(gate)
    quant_config = quant_config_of(backend, layer)
    config = moe_config(gate, experts=EXPERTS, hidden=HIDDEN, inner=INNER)
    experts = experts_cls(moe_config=config, quant_config=quant_config)
    experts.process_weights_after_loading(layer)
    experts.layer = layer
    return experts


def run(experts: Any, gate: Gate, packed: bool = True) -> None:
    """One call, of ``TOKENS`` tokens, as vLLM's modular kernel makes it."""
    hidden = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)
    if packed:
        hidden = torch.zeros(TOKENS, HIDDEN // 2, dtype=torch.uint8)
    experts.apply(
        output=torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16),
        hidden_states=hidden,
        w1=experts.layer.w13_weight,
        w2=experts.layer.w2_weight,
        topk_weights=torch.full((TOKENS, TOPK), 0.25),
        topk_ids=torch.arange(TOPK).expand(TOKENS, TOPK),
        activation=ACTIVATION[gate.form],
        global_num_experts=EXPERTS,
        expert_map=None,
        a1q_scale=torch.zeros(TOKENS, HIDDEN // 16).to(torch.float8_e4m3fn) if packed else None,
        a2_scale=None,
        workspace13=torch.zeros(TOKENS * TOPK * 2 * INNER, dtype=torch.bfloat16),
        workspace2=torch.zeros(TOKENS * TOPK * 2 * INNER, dtype=torch.bfloat16),
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
