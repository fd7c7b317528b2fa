"""The backends, each of which runs NVFP4 experts with one family of kernels.

A new backend is one file or folder here, with a class that inherits
:class:`vllm_nvfp4_moe.method.NvFp4MoEMethod`, and one entry in ``_methods``.
:mod:`vllm_nvfp4_moe.interface` says what the class must have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_nvfp4_moe.activation import apply_contract

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.context import ModelContext
    from vllm_nvfp4_moe.method import NvFp4MoEMethod


_PER_TOKEN = "--quantization-config asks for activations with a scale for each token"


def _methods() -> Iterator[type[NvFp4MoEMethod]]:
    """The methods in order of preference. Each is imported only if none before it fits."""
    from vllm_nvfp4_moe.backends.hopper.method import HopperMethod

    yield HopperMethod
    from vllm_nvfp4_moe.backends.vllm_kernels import VllmKernelsMethod

    yield VllmKernelsMethod
    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

    yield CpuMethod


def choose(context: ModelContext, layer: RoutedExperts, weight_only: bool) -> NvFp4MoEMethod:
    """The method for ``layer``. Sets the layer to the contract's gate before it chooses.

    Args:
        context: of the model that the layer belongs to.
        weight_only: the layer's experts come without input scales.

    Raises:
        ValueError: if no backend supports the layer; the message has each one's reason.
    """
    apply_contract(layer, context.gates.of(layer.layer_name))
    reasons = []
    missed: list[tuple[str, str]] = []
    for method in _methods():
        asked = context.format.per_token and not method.takes_per_token
        reason = _PER_TOKEN if asked else method.unsupported(layer)
        if reason is None:
            chosen = method(context, layer, weight_only)
            chosen.passed_over = [*missed, *chosen.passed_over]
            return chosen
        reasons.append(f"{method.__name__}: {reason}")
        if not asked and (name := method.missed(layer)):
            missed.append((name, reason))
    raise ValueError(f"{layer.layer_name}: no way to run its NVFP4 experts; {'; '.join(reasons)}")
