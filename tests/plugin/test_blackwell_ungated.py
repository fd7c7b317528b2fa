"""Experts without a gate in vLLM's kernels: w13, which is up alone, into each kernel's layout and
back; and that each is asked for ReLU², which it then computes as written here from its source.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.fused_moe.oracle import nvfp4

from tests.plugin import nemotron
from tests.plugin.blackwell import (
    ACTIVATION,
    FUSED_MOE,
    RELU2,
    FlashInferActivation,
    pretend_flashinfer,
)
from tests.plugin.blackwell_layer import INNER, TOKENS, TOPK, experts_of, run
from tests.plugin.conversions import EXPERTS, Experts, bits, marlin_scales, padded, unswizzled
from tests.plugin.test_blackwell_conversions import SIZES, assert_tiled, up
from tests.plugin.test_blackwell_elementwise import evaluated
from tests.plugin.test_blackwell_flashinfer import (
    TRTLLM_CLASSES,
    Recorder,
    flashinfer_cutlass,
    trtllm,
)
from tests.plugin.test_vllm_kernels import Calls
from tests.plugin.test_vllm_kernels import calls as calls  # a fixture

ALL_SIZES = (*SIZES, (256, 48), (320, 208))


@pytest.fixture(autouse=True)
def stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's ``swizzle_blockscale`` moves its result to the GPU, whatever it was given."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)


def relu2(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0) ** 2


# -- conversions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", ALL_SIZES, ids=str)
@pytest.mark.parametrize(
    ("backend", "weight_only"),
    [
        ("VLLM_CUTLASS", False),
        ("FLASHINFER_CUTLASS", False),
        ("FLASHINFER_B12X", False),
        ("B12X", False),
        ("B12X", True),
    ],
)
def test_tiled_scales(backend: str, weight_only: bool, sizes: tuple[int, int]) -> None:
    """Rows in order, and as many more of zeros as fill a tile of scales; w2 has their columns."""
    experts = Experts.random(*sizes)
    _, (w13, w13_scale, w13_global, _, w2, w2_scale, w2_global, _) = experts.converted(
        backend, RELU2, weight_only
    )
    inner = up(sizes[1], 128)
    assert torch.equal(w13, padded(experts.up, inner, sizes[0] // 2))
    assert_tiled(w13_scale, padded(experts.up_scale, inner, sizes[0] // 16))
    assert torch.equal(w2, padded(experts.down, sizes[0], inner // 2))
    assert_tiled(w2_scale, padded(experts.down_scale, sizes[0], inner // 16))
    assert torch.equal(w13_global, experts.w13_global)
    assert torch.equal(w2_global, experts.down_global)


@pytest.mark.parametrize("sizes", ALL_SIZES, ids=str)
def test_cutedsl(sizes: tuple[int, int]) -> None:
    """Rows in order, where a gate's and up's would alternate by 64."""
    experts = Experts.random(*sizes)
    layer, (w13, w13_scale, _, inputs, w2, w2_scale, _, _) = experts.converted(
        "FLASHINFER_CUTEDSL", RELU2
    )
    hidden, inner = up(sizes[0], 256), up(sizes[1], 128)
    assert torch.equal(w13, padded(experts.up, inner, hidden // 2))
    assert torch.equal(unswizzled(w13_scale), padded(experts.up_scale, inner, hidden // 16))
    assert torch.equal(w2, padded(experts.down, hidden, inner // 2))
    assert torch.equal(unswizzled(w2_scale), padded(experts.down_scale, hidden, inner // 16))
    config = layer.moe_config
    assert (config.hidden_dim, config.intermediate_size_per_partition) == (hidden, inner)
    assert config.hidden_dim_unpadded == sizes[0]
    assert inputs.tolist() == [2.0] * EXPERTS


def test_emulation_leaves_them_as_they_are() -> None:
    experts = Experts.random(96, 48)
    _, (w13, w13_scale, _, _, w2, w2_scale, _, _) = experts.converted("EMULATION", RELU2)
    assert torch.equal(w13, experts.up) and torch.equal(bits(w13_scale), bits(experts.up_scale))
    assert torch.equal(w2, experts.down) and torch.equal(bits(w2_scale), bits(experts.down_scale))


@pytest.mark.parametrize("sizes", [(256, 128), (128, 48), (192, 64)], ids=str)
def test_marlin(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    """Codes, which need a GPU to be repacked, go through, padded; all scales are large enough."""
    marlin = "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4"
    module = importlib.import_module(marlin)
    monkeypatch.setattr(module, "_repack_marlin_experts", lambda weight, *_: weight)
    experts = Experts.random(*sizes, largest=0x18)
    _, (w13, w13_scale, w13_global, *_) = experts.converted("MARLIN", RELU2)
    hidden, inner = sizes
    grown = up(inner, 64 if hidden % 128 == 0 else 128)
    assert torch.equal(w13, padded(experts.up, grown, hidden // 2))
    factor = float((experts.w13_global * 2.0**119 / w13_global)[0])
    for got, scales in zip(w13_scale, padded(experts.up_scale, grown, hidden // 16), strict=True):
        want = scales.view(torch.float8_e4m3fn).float()
        want[want * factor < 2**-6] = 0
        assert torch.equal(marlin_scales(got, factor), want)


# -- what the kernels are asked for ----------------------------------------------------------------


@pytest.mark.parametrize("name", TRTLLM_CLASSES)
def test_trtllm(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """``scaleC * relu(scaleAct * x0) ** 2`` of the GEMM's raw sums x0: FlashInfer hands the scale
    that it calls a gate's over as scaleAct, too (trtllm_batched_gemm_runner.cu:351), and
    KernelRunner.h:79 has the formula. So the other scale must be without the weights'."""
    seen = trtllm(monkeypatch, name, TRTLLM_CLASSES[name], RELU2).seen
    assert seen["activation_type"] == FlashInferActivation.Relu2
    assert all(seen[f"gemm1_{n}"] is None for n in ("alpha", "beta", "clamp_limit"))
    value = torch.linspace(-9, 9, 37)
    for expert, weight_scale in enumerate((0.5, 0.02, 3.0, 0.125)):
        raw = value / (weight_scale * 0.25)  # over global scale times input scale
        gate, out = (float(seen[f"output1_scale_{n}"][expert]) for n in ("gate_scalar", "scalar"))
        torch.testing.assert_close(out * relu2(gate * raw), relu2(value) / 0.5)


def test_flashinfer_cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relu2 of a value that has its scale (cutlass_fused_moe_kernels.cuh:2683)."""
    seen = flashinfer_cutlass(monkeypatch, RELU2)
    assert seen["activation_type"] == FlashInferActivation.Relu2
    assert all(seen[f"swiglu_{n}"] is None for n in ("alpha", "beta", "limit"))


def test_cutedsl_is_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """``relu(w1_alpha * x) ** 2``
    (blackwell/blockscaled_contiguous_gather_grouped_gemm_act_fusion.py:2760)."""
    pretend_flashinfer(monkeypatch)
    monkeypatch.setattr(nvfp4, "nvfp4_swizzled_scale_to_cutedsl_mma_view", lambda scale: scale)
    module = importlib.import_module(f"{FUSED_MOE}.experts.flashinfer_cutedsl_moe")
    recorder = Recorder("cute_dsl_fused_moe_nvfp4")
    monkeypatch.setattr(module, "flashinfer_cute_dsl_fused_moe_nvfp4", recorder)
    run(experts_of("FLASHINFER_CUTEDSL", module.FlashInferCuteDSLExperts, RELU2), RELU2)
    assert recorder.seen["activation_type"] == FlashInferActivation.Relu2
    assert not any(name.startswith(("swiglu", "situ")) for name in recorder.seen)
    assert torch.equal(recorder.seen["w1_alpha"], torch.tensor([0.5, 0.02, 3.0, 0.125]) * 0.25)


def test_marlin_and_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's elementwise function, which both call."""
    torch.manual_seed(0)
    middle = torch.randn(TOKENS * TOPK, INNER)
    results = []

    def fused_marlin_moe(**kwargs: Any) -> None:
        assert kwargs["activation"] == ACTIVATION["relu2"]
        results.append(torch.full_like(middle, torch.nan))
        kwargs["activation_func"](kwargs["activation"], results[-1], middle.clone())

    module = importlib.import_module(f"{FUSED_MOE}.experts.marlin_moe")
    monkeypatch.setattr(module, "fused_marlin_moe", fused_marlin_moe)
    run(experts_of("MARLIN", module.MarlinExperts, RELU2), RELU2, packed=False)
    module = importlib.import_module(f"{FUSED_MOE}.experts.nvfp4_emulation_moe")
    experts = experts_of("EMULATION", module.Nvfp4QuantizationEmulationTritonExperts, RELU2)
    results.append(torch.full_like(middle, torch.nan))
    experts.activation(ACTIVATION["relu2"], results[-1], middle.clone())
    for result in results:
        assert torch.equal(result, relu2(middle))


def test_humming() -> None:
    humming = importlib.import_module(
        "vllm.model_executor.layers.quantization.utils.humming.activation"
    )
    asked = humming.get_humming_activation(ACTIVATION["relu2"])
    assert asked["activation_type"] == "unary"
    for value in (-9.0, -0.5, 0.0, 0.25, 3.0):
        assert evaluated(asked["activation_impl"], value, 5.0) == max(value, 0.0) ** 2


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_up_reaches_the_oracle(
    load: Callable[..., dict[str, Any]], calls: Calls, tmp_path: Path, layout: str
) -> None:
    folder = nemotron.quantized(nemotron.write(tmp_path / "bf16"), tmp_path / layout, layout)
    layer = load(folder)[nemotron.LAYER].routed_experts
    assert calls["select"]["activation"] == "relu2_no_mul"
    assert calls["select"]["gate"] == RELU2
    given, tensors = calls["convert"], load_file(folder / "model.safetensors")
    assert given["is_act_and_mul"] is False
    codes = "weight" if layout == "modelopt" else "weight_packed"
    for expert in (0, 7):
        base = f"{nemotron.STORED}.{expert}."
        for mine, name in (("w13", "up_proj"), ("w2", "down_proj")):
            assert torch.equal(given[mine][expert], tensors[f"{base}{name}.{codes}"])
            scale = tensors[f"{base}{name}.weight_scale"]
            assert torch.equal(given[f"{mine}_scale"][expert].float(), scale.float())
            if layout == "modelopt":
                whole = tensors[f"{base}{name}.weight_scale_2"]
            else:
                whole = 1 / tensors[f"{base}{name}.weight_global_scale"][0]
            torch.testing.assert_close(given[f"{mine}_scale_2"][expert], whole, rtol=1e-6, atol=0)
    assert given["w13_scale_2"].shape == given["w2_scale_2"].shape == (8,)
    assert torch.all(given["a13_scale"] == 1) and given["a13_scale"].shape == (8, 1)
    assert calls["kernel"]["moe_config"].hidden_dim == nemotron.LATENT
    assert layer.activation == ACTIVATION["relu2"]
