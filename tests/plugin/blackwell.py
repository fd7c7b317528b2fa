"""A machine with a Blackwell GPU and FlashInfer, as far as vLLM's choice of kernels looks."""

from __future__ import annotations

import enum
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.oracle import nvfp4
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from quantize.experts.gates import Gate

FUSED_MOE = "vllm.model_executor.layers.fused_moe"

ASKING = (
    "vllm.platforms",
    f"{FUSED_MOE}.config",
    f"{FUSED_MOE}.modular_kernel",
    f"{FUSED_MOE}.activation",
    f"{FUSED_MOE}.b12x",
    f"{FUSED_MOE}.flashinfer_moe_ep",
    f"{FUSED_MOE}.experts.trtllm_nvfp4_moe",
    f"{FUSED_MOE}.experts.flashinfer_cutedsl_moe",
    f"{FUSED_MOE}.experts.flashinfer_cutedsl_batched_moe",
    f"{FUSED_MOE}.experts.flashinfer_cutlass_moe",
    f"{FUSED_MOE}.experts.flashinfer_b12x_moe",
    f"{FUSED_MOE}.experts.cutlass_moe",
    f"{FUSED_MOE}.experts.marlin_moe",
    f"{FUSED_MOE}.experts.fused_humming_moe",
    f"{FUSED_MOE}.experts.triton_moe",
    "vllm_nvfp4_moe.backends.vllm_kernels",
    "vllm_nvfp4_moe.backends.cpu.method",
)
"""Modules that look at the platform when kernels are chosen."""

M3 = Gate("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0)
SILU = Gate("silu")
STEP = Gate("swiglu_step", limit=7.0)
GELU = Gate("gelu")
GELU_TANH = Gate("gelu_tanh")
RELU2 = Gate("relu2")
SITU = Gate("situ", alpha=4.0, limit=25.0)  # Kimi-K3, Inkling 2

ACTIVATION = {
    "silu": MoEActivation.SILU,
    "swiglu_oai": MoEActivation.SWIGLUOAI_UNINTERLEAVE,
    "swiglu_step": MoEActivation.SWIGLUSTEP,
    "gelu": MoEActivation.GELU,
    "gelu_tanh": MoEActivation.GELU_TANH,
    "relu2": MoEActivation.RELU2_NO_MUL,
    "situ": MoEActivation.SITU,
}

_ALONE = {
    "tp_size": 1, "pcp_size": 1, "dp_size": 1, "ep_size": 1, "sp_size": 1, "use_ep": False,
    "all2all_backend": "allgather_reducescatter", "enable_eplb": False,
}  # fmt: skip

# As FusedMoEParallelConfig.make's docstring has them: with EP, tp_size is 1.
PARALLEL: dict[str, dict[str, Any]] = {
    "single": {},
    "TP2": {"tp_size": 2},
    "EP2": {"ep_size": 2, "use_ep": True},
    "DP2+EP": {"dp_size": 2, "ep_size": 2, "use_ep": True},
    "DP2+EP deepep_ht": {
        "dp_size": 2, "ep_size": 2, "use_ep": True, "all2all_backend": "deepep_high_throughput",
    },
    "DP2+EP deepep_ll": {
        "dp_size": 2, "ep_size": 2, "use_ep": True, "all2all_backend": "deepep_low_latency",
    },
    "EPLB": {"ep_size": 2, "use_ep": True, "enable_eplb": True},
}  # fmt: skip


class FlashInferActivation(enum.IntEnum):
    """``ActivationType`` of flashinfer-python 0.7.0.post1, which vLLM 0.32 asks for
    (flashinfer/tllm_enums.py:68). 0.7.2.post1, for vLLM 0.33, adds one after the last."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9
    Situ = 10
    InvalidType = 11


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """A CUDA platform of that capability, with FlashInfer, Humming and b12x installed."""

    class Pretended(Platform):
        _enum = PlatformEnum.CUDA
        device_name = "pretended"
        device_type = "cuda"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

    # All imported before anything is pretended: a module that was imported meanwhile would keep it.
    for backend in nvfp4.NvFp4MoeBackend:
        nvfp4.backend_to_kernel_cls(backend)
    for module in [importlib.import_module(name) for name in ASKING]:
        monkeypatch.setattr(module, "current_platform", Pretended())
        for helper in vars(module).copy():
            if helper.startswith(("has_flashinfer_", "has_humming")):
                monkeypatch.setattr(module, helper, lambda: True)
    b12x = SimpleNamespace(is_supported=lambda: True)
    monkeypatch.setattr(
        importlib.import_module(f"{FUSED_MOE}.b12x"), "get_b12x_fused_moe", lambda: b12x
    )

    class GemmType(enum.Enum):  # humming-kernels 0.1.17, humming/config
        DENSE = "dense"
        INDEXED = "indexed"
        GROUPED_CONTIGUOUS = "grouped_contiguous"
        GROUPED_MASKED = "grouped_masked"

    humming = importlib.import_module("vllm.utils.humming")
    # By item: asking the module for what it lacks would import Humming.
    monkeypatch.setitem(vars(humming), "GemmType", GemmType)
    pretend_flashinfer(monkeypatch)


def pretend_flashinfer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable ``flashinfer`` with the enumeration of activations and nothing else."""
    names = ("flashinfer", "flashinfer.fused_moe", "flashinfer.fused_moe.core")
    modules: list[Any] = [ModuleType(name) for name in names]
    modules[0].fused_moe, modules[1].core = modules[1], modules[2]
    modules[2].ActivationType = FlashInferActivation
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    return modules[0]


def moe_config(
    gate: Gate,
    parallel: str = "single",
    moe_backend: Any = "auto",
    experts: int = 32,
    hidden: int = 256,
    inner: int = 128,
) -> FusedMoEConfig:
    """What a MiniMax-M3 layer of these sizes gives vLLM, with its gate already set to ``gate``: on
    a GPU, since on a CPU vLLM gives none without a gate."""
    modes = {**_ALONE, **PARALLEL[parallel]}
    ranks = {f"{name}_rank": 0 for name in ("tp", "pcp", "dp", "ep")}
    numbers: tuple[float | None, ...] = (None,) * 3
    if gate.form == "swiglu_oai":  # as activation.apply_contract does
        numbers = (gate.alpha, gate.beta, gate.limit)
    alpha, beta, limit = numbers
    situ = (gate.alpha, gate.limit) if gate.form == "situ" else (None, None)
    gpu = SimpleNamespace(is_cuda_alike=lambda: True)
    with mock.patch(f"{FUSED_MOE}.config.current_platform", gpu):
        return FusedMoEConfig(
            num_experts=experts,
            num_logical_experts=experts,
            num_local_experts=experts // modes["ep_size"],
            experts_per_token=4,
            hidden_dim=hidden,
            intermediate_size=inner,
            activation=ACTIVATION[gate.form],
            device="cpu",
            routing_method=RoutingMethodType.MiniMax2,
            moe_parallel_config=FusedMoEParallelConfig(**modes, **ranks),
            in_dtype=torch.bfloat16,
            router_logits_dtype=torch.float32,
            moe_backend=moe_backend,
            swiglu_alpha=alpha,
            swiglu_beta=beta,
            swiglu_limit=limit,
            activation_situ_beta=situ[0],
            activation_situ_linear_beta=situ[1],
        )
