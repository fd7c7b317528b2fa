"""Making a vLLM fused-MoE layer apply the gate contract, in vLLM's own terms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform

from quantize.gates import Gate

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

logger = init_logger("vllm.nvfp4_moe.activation")

# vLLM 0.32: w13 is loaded as all of gate, then all of up, which these variants read.
_VLLM_NAME = {
    "silu": MoEActivation.SILU,
    "swiglu_oai": MoEActivation.SWIGLUOAI_UNINTERLEAVE,
    "gelu": MoEActivation.GELU,
    "gelu_tanh": MoEActivation.GELU_TANH,
}


def engine_gate(layer: RoutedExperts) -> str:
    """What the layer would apply if left alone, for messages."""
    numbers = {
        "alpha": layer.swiglu_alpha,
        "beta": layer.swiglu_beta,
        "limit": layer.swiglu_limit,
    }
    said = ", ".join(f"{k}={v:g}" for k, v in numbers.items() if v is not None)
    return f"{layer.activation.value}({said})" if said else layer.activation.value


def apply_contract(layer: RoutedExperts, gate: Gate) -> None:
    """Set ``layer`` and its ``moe_config`` (shared with its runner) to ``gate``.

    Must run before kernels are chosen, since the choice depends on the activation.

    Raises:
        ValueError: if vLLM has no name for the gate, or the layer is not a gated one; names both.
    """
    before = engine_gate(layer)
    activation = _VLLM_NAME.get(gate.form)
    # vLLM's kernels for the clamped form insist on a clamp.
    unclamped = gate.form == "swiglu_oai" and gate.limit is None and not current_platform.is_cpu()
    if activation is None or gate.interleaved or unclamped or not layer.moe_config.is_act_and_mul:
        raise ValueError(
            f"{layer.layer_name}: the checkpoint's experts apply {gate}, vLLM's layer would apply "
            f"{before}, and vLLM has no kernels for the former in this layer: refusing to serve it"
        )
    numbers = (gate.alpha, gate.beta, gate.limit) if gate.form == "swiglu_oai" else (None,) * 3
    for owner in (layer, layer.moe_config):
        owner.activation = activation
        owner.swiglu_alpha, owner.swiglu_beta, owner.swiglu_limit = numbers
    if engine_gate(layer) != before:
        logger.info_once(
            "Experts apply the checkpoint's gate, %s, where vLLM's layer would have applied %s",
            str(gate),
            before,
        )
