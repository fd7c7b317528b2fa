"""Ways to run NVFP4 experts. A new one is one file here and one entry in ``_methods``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_nvfp4_moe.activation import apply_contract

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from vllm_nvfp4_moe.config import NvFp4MoEConfig
    from vllm_nvfp4_moe.method import NvFp4MoEMethod


def _methods() -> Iterator[type[NvFp4MoEMethod]]:
    """In order of preference; each is imported only if those before it do not fit."""
    from vllm_nvfp4_moe.backends.hopper.method import HopperMethod

    yield HopperMethod
    from vllm_nvfp4_moe.backends.vllm_kernels import VllmKernelsMethod

    yield VllmKernelsMethod
    from vllm_nvfp4_moe.backends.cpu import CpuMethod

    yield CpuMethod


def choose(config: NvFp4MoEConfig, layer: RoutedExperts, weight_only: bool) -> NvFp4MoEMethod:
    """The method for ``layer``, after its gate has been set to the contract's.

    Args:
        weight_only: the layer's experts come without input scales.

    Raises:
        ValueError: if no backend supports the layer; gives each one's reason.
    """
    assert config.gates is not None, "vLLM calls maybe_update_config before it builds layers"
    apply_contract(layer, config.gates.of(layer.layer_name))
    reasons = []
    missed: list[tuple[str, str]] = []
    for method in _methods():
        reason = method.unsupported(layer)
        if reason is None:
            chosen = method(config, layer, weight_only)
            chosen.passed_over = [*missed, *chosen.passed_over]
            return chosen
        reasons.append(f"{method.__name__}: {reason}")
        if name := method.missed(layer):
            missed.append((name, reason))
    raise ValueError(f"{layer.layer_name}: no way to run its NVFP4 experts; {'; '.join(reasons)}")
