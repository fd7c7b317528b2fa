"""Makes a fused-MoE layer of vLLM apply the gate of the contract, in vLLM's own terms.

A new form of gate gets one line in ``VLLM_NAME``. Which of vLLM's kernels then apply it is read,
and written down, in :mod:`vllm_nvfp4_moe.backends.gate_support`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.platforms import current_platform

from quantize.experts.gates import Gate

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

logger = init_logger("vllm.nvfp4_moe.activation")

STEP_LIMIT = 7.0
"""The only limit of ``swiglu_step`` in vLLM 0.32's GPU kernels: they do not look at the layer's."""

GPT_OSS = (1.702, 1.0, 7.0)
"""Alpha, beta and limit of its activation, where a layer does not say them."""

VLLM_NAME = {
    "silu": MoEActivation.SILU,
    "swiglu_oai": MoEActivation.SWIGLUOAI_UNINTERLEAVE,
    "swiglu_step": MoEActivation.SWIGLUSTEP,
    "gelu": MoEActivation.GELU,
    "gelu_tanh": MoEActivation.GELU_TANH,
    "relu2": MoEActivation.RELU2_NO_MUL,
    "situ": MoEActivation.SITU,
}
"""vLLM 0.32's activation for each form of gate. w13 is loaded as all of gate, then all of up, and
these are the variants that read it so; without a gate, w13 is up alone. vLLM has no ReLU that is
not squared."""


def engine_gate(layer: RoutedExperts) -> str:
    """The gate that ``layer`` is set to, for messages."""
    config = layer.moe_config
    numbers = {
        "alpha": layer.swiglu_alpha,
        "beta": layer.swiglu_beta,
        "limit": layer.swiglu_limit,
    }
    if layer.activation == MoEActivation.SITU:
        numbers["alpha"] = config.activation_situ_beta
        numbers["limit"] = config.activation_situ_linear_beta
    said = ", ".join(f"{k}={v:g}" for k, v in numbers.items() if v is not None)
    return f"{layer.activation.value}({said})" if said else layer.activation.value


def apply_contract(layer: RoutedExperts, gate: Gate, ours: bool = True) -> None:
    """Set ``layer`` and its ``moe_config``, which it shares with its runner, to ``gate``.

    This must run before kernels are chosen, since the choice depends on the activation.

    Args:
        ours: a backend of this package runs the layer; else one of vLLM's own methods does.

    Raises:
        ValueError: if vLLM's kernels cannot apply the gate in this layer; the message has the gate
            and what the layer would have applied. Also if a norm follows its experts' second GEMM.
    """
    if gate.post_norm:
        raise ValueError(
            f"{layer.layer_name}: the checkpoint's experts apply {gate}: a norm follows down_proj, "
            "before the router's weight, and this plugin's layers have none: refusing to serve it. "
            "vLLM's own class for the model has (Muse Spark's, from vLLM 0.33 on)"
        )
    before = engine_gate(layer)
    activation = VLLM_NAME.get(gate.form)
    if (
        activation is None
        or gate.interleaved
        or not _has_kernel(gate, ours)
        or activation.is_gated != layer.moe_config.is_act_and_mul
    ):
        raise ValueError(
            f"{layer.layer_name}: the checkpoint's experts apply {gate}, vLLM's layer would apply "
            f"{before}, and vLLM has no kernels for the former in this layer: refusing to serve it"
        )
    numbers = (gate.alpha, gate.beta, gate.limit) if gate.form == "swiglu_oai" else (None,) * 3
    for owner in (layer, layer.moe_config):
        owner.activation = activation
        owner.swiglu_alpha, owner.swiglu_beta, owner.swiglu_limit = numbers
    config = layer.moe_config
    situ = (gate.alpha, gate.limit) if gate.form == "situ" else (None, None)
    config.activation_situ_beta, config.activation_situ_linear_beta = situ
    if engine_gate(layer) != before:
        logger.info_once(
            "Experts apply the checkpoint's gate, %s, where vLLM's layer would have applied %s",
            str(gate),
            before,
        )


def differs(layer: RoutedExperts, gate: Gate) -> bool:
    """Whether ``layer`` is set to another gate than ``gate``.

    GPT-OSS's class alternates gate and up in memory, which is no other gate.
    """
    return _applied(layer) != (gate.form, gate.alpha, gate.beta, gate.limit)


def _applied(layer: RoutedExperts) -> tuple[str | None, float | None, float | None, float | None]:
    """Form, alpha, beta and limit of what vLLM's kernels apply in ``layer``."""
    numbers = layer.swiglu_alpha, layer.swiglu_beta, layer.swiglu_limit
    if layer.activation == MoEActivation.SILU and layer.swiglu_limit is not None:
        return "swiglu_oai", 1.0, 0.0, layer.swiglu_limit  # which clamps both
    if layer.activation == MoEActivation.SWIGLUOAI:
        pairs = zip(numbers, GPT_OSS, strict=True)
        alpha, beta, limit = (own if number is None else number for number, own in pairs)
        return "swiglu_oai", alpha, beta, limit
    if layer.activation == MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        return "swiglu_oai", *numbers
    if layer.activation == MoEActivation.SWIGLUSTEP:
        return "swiglu_step", 1.0, 0.0, STEP_LIMIT
    if layer.activation == MoEActivation.SITU:
        config = layer.moe_config
        return "situ", config.activation_situ_beta, 0.0, config.activation_situ_linear_beta
    forms = (form for form, name in VLLM_NAME.items() if name == layer.activation)
    return next(forms, None), 1.0, 0.0, None


def _has_kernel(gate: Gate, ours: bool) -> bool:
    """Whether this platform's kernels can apply the gate's numbers."""
    if current_platform.is_cpu():
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        # This package's own kernels apply all forms.
        return ours or CPUUnquantizedExperts._supports_activation(VLLM_NAME[gate.form])
    if gate.form == "swiglu_step":
        return gate.limit == STEP_LIMIT
    return gate.form != "swiglu_oai" or gate.limit is not None
