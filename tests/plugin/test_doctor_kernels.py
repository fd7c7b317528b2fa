"""Which kernels doctor asks for, and how; with the answers of a GPU's machine made up."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.oracle import nvfp4
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

from vllm_nvfp4_moe.backends.hopper.method import HopperMethod
from vllm_nvfp4_moe.backends.vllm_kernels import VllmKernelsMethod
from vllm_nvfp4_moe.doctor import kernels
from vllm_nvfp4_moe.doctor.inputs import Batch
from vllm_nvfp4_moe.doctor.kernels import AUTO, VARIANTS, survey, ways
from vllm_nvfp4_moe.doctor.layer import Layer, Way, WrongKernelError
from vllm_nvfp4_moe.doctor.shape import MINIMAX_M3

OURS = {"hopper bf16": "bf16", "hopper fp8": "fp8"}
VLLMS = {
    *("marlin", "humming", "emulation", "cutlass", "flashinfer_trtllm", "flashinfer_cutlass"),
    *("flashinfer_cutedsl", "flashinfer_b12x", "b12x", "flashinfer_moe_ep_cutedsl"),
}


def test_every_backend_of_vllms_is_asked_for_by_its_flag() -> None:
    every = ways()
    assert set(every) >= VLLMS | set(OURS)
    for name in VLLMS:
        assert every[name] == Way(name, "VllmKernelsMethod", "", "")
    for name, activations in OURS.items():
        assert every[name] == Way("auto", "HopperMethod", "HOPPER", activations)
    assert every["cpu AVX2"] == Way("auto", "CpuMethod", "", "", "inf=AVX2")
    backends = {nvfp4.map_nvfp4_backend(name) for name in VLLMS}
    # This one is for tokens that come in batches by expert.
    assert backends == {*NvFp4MoeBackend} - {NvFp4MoeBackend.FLASHINFER_CUTEDSL_BATCHED}


def made_up(method: type, **more: Any) -> Any:
    """A layer whose method is of that class."""
    fake: Any = method.__new__(method)
    vars(fake).update(more)
    fake.passed_over = []
    experts = SimpleNamespace(quant_method=fake, moe_config="config")
    return Layer(SimpleNamespace(routed_experts=experts), None)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a Hopper GPU: this package's kernel first, of vLLM's Humming; Marlin runs, and
    TRT-LLM does not."""
    bf16 = SimpleNamespace(name="HOPPER (bf16)", activation_bits=16)
    fp8 = SimpleNamespace(name="HOPPER FP8 (e4m3)", activation_bits=8)
    experts = SimpleNamespace(__name__="Experts")
    context = SimpleNamespace(gates=None)

    def make(shape: Any, way: Way, device: torch.device, weights_only: bool) -> Layer:
        assert device.type == "meta" and weights_only
        if way == AUTO or way.method == "HopperMethod":
            kernel = fp8 if way.activations == "fp8" else bf16
            return made_up(HopperMethod, hopper_kernel=kernel, context=context)
        if way.backend == "marlin":
            return made_up(
                VllmKernelsMethod, nvfp4_backend=NvFp4MoeBackend.MARLIN, experts_cls=experts,
                per_token_activation=False,
            )  # fmt: skip
        if way.method == "CpuMethod":
            return made_up(HopperMethod, hopper_kernel=bf16, context=context)
        raise ValueError("no NVFP4 kernels: no. Asked: " + f"{way.backend.upper()}: not on 9.0")

    monkeypatch.setattr(kernels, "make", make)
    monkeypatch.setattr(kernels, "told_to", lambda way: nullcontext())
    monkeypatch.setattr("vllm.config.set_current_vllm_config", lambda config: nullcontext())
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(
        "vllm_nvfp4_moe.backends.cpu.method.current_platform",
        SimpleNamespace(is_cpu=lambda: False),
    )
    monkeypatch.setattr(
        nvfp4, "select_nvfp4_moe_backend", lambda *_: (NvFp4MoeBackend.HUMMING, experts)
    )


def test_a_survey_has_every_reason_and_both_choices(hopper: None) -> None:
    found = survey(MINIMAX_M3, VARIANTS[0], torch.device("cuda", 0))
    assert (found["chosen"], found["stock"]) == ("hopper bf16", "humming")
    reasons = found["kernels"]
    assert [name for name, why in reasons.items() if why is None] == [*OURS, "marlin"]
    assert reasons["flashinfer_trtllm"] == "FLASHINFER_TRTLLM: not on 9.0"
    assert reasons["cpu numba"] == "the platform is not a CPU"


def test_another_kernel_than_was_asked_for() -> None:
    layer = made_up(
        HopperMethod, hopper_kernel=SimpleNamespace(name="HOPPER (bf16)", activation_bits=16)
    )
    layer.check(ways()["hopper bf16"])
    with pytest.raises(WrongKernelError, match="VllmKernelsMethod  was asked for"):
        layer.check(ways()["marlin"])


def test_a_kernel_that_routes_by_itself_gets_logits_and_padding() -> None:
    given: list[torch.Tensor] = []

    class Method:
        is_monolithic = True

        def apply_monolithic(self, experts: Any, x: torch.Tensor, logits: Any) -> torch.Tensor:
            given.extend((x, logits))
            return x + 1

    experts = SimpleNamespace(quant_method=Method(), moe_config=SimpleNamespace(hidden_dim=256))
    router = SimpleNamespace(prepare_monolithic_logits=lambda logits: logits * 2)
    from vllm.config import VllmConfig

    layer = Layer(SimpleNamespace(routed_experts=experts, router=router), VllmConfig())
    x, logits = torch.ones(3, 240).bfloat16(), torch.ones(3, 8)
    out = layer(Batch(x, logits, logits, logits))
    assert out.shape == (3, 240) and given[0].shape == (3, 256)
    assert bool((given[0][:, 240:] == 0).all()) and torch.equal(given[1], logits * 2)
