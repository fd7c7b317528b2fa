"""Weights go into each kernel's layout and come back bit for bit, gate and up in their places.

Conversions that need a GPU or FlashInfer itself are in tests/gpu/test_conversions.py.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

from quantize.experts.gates import Gate
from tests.plugin.blackwell import FUSED_MOE, M3, SILU, moe_config
from tests.plugin.conversions import (
    EXPERTS,
    Experts,
    bits,
    marlin_scales,
    padded,
    unswizzled,
)
from vllm_nvfp4_moe.backends import vllm_kernels

# Hidden and intermediate size of a rank. Block scales come in tiles of 128 rows and 64 columns, so
# of the last three down's rows, and of the last also gate's and up's columns, need padding.
SIZES = ((256, 128), (192, 64), (448, 192), (96, 64))


@pytest.fixture(autouse=True)
def stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's ``swizzle_blockscale`` moves its result to the GPU, whatever it was given."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def assert_tiled(scales: torch.Tensor, *halves: torch.Tensor) -> None:
    """``scales`` are ``halves``, one above the other, tiled and padded with zeros."""
    rows = sum(h.shape[1] for h in halves)
    columns = halves[0].shape[2]
    want = padded(torch.cat([bits(h) for h in halves], 1), up(rows, 128), up(columns, 4))
    assert scales.shape == want.shape
    assert torch.equal(unswizzled(scales), want)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("backend", "gate", "up_first", "shared_inputs"),
    [
        ("VLLM_CUTLASS", M3, False, False),
        ("FLASHINFER_CUTEDSL_BATCHED", SILU, False, True),
        ("FLASHINFER_CUTLASS", M3, True, True),
        ("FLASHINFER_B12X", SILU, True, True),
    ],
)
def test_tiled_scales(
    backend: str, gate: Gate, up_first: bool, shared_inputs: bool, sizes: tuple[int, int]
) -> None:
    experts = Experts.random(*sizes)
    _, (w13, w13_scale, w13_global, inputs, w2, w2_scale, w2_global, w2_inputs) = experts.converted(
        backend, gate
    )
    first, second = experts.gate, experts.up
    first_scale, second_scale = experts.gate_scale, experts.up_scale
    if up_first:
        first, second, first_scale, second_scale = second, first, second_scale, first_scale
    assert torch.equal(w13, torch.cat((first, second), 1))
    assert_tiled(w13_scale, first_scale, second_scale)
    assert torch.equal(w2, experts.down)
    assert_tiled(w2_scale, experts.down_scale)
    assert torch.equal(w13_global, experts.w13_global)
    assert torch.equal(w2_global, experts.down_global)
    # Of input scales, FlashInfer's kernels take the largest for all experts.
    own = [0.5, 2.0, 0.25]
    assert inputs.tolist() == w2_inputs.tolist() == ([2.0] * 3 if shared_inputs else own)


@pytest.mark.parametrize(
    "backend",
    ["VLLM_CUTLASS", "FLASHINFER_CUTEDSL_BATCHED", "FLASHINFER_CUTLASS", "FLASHINFER_B12X"],
)
def test_sizes_that_would_misplace_up_are_an_error(backend: str) -> None:
    """Gate and up of 48 rows would need padding in the middle, which vLLM 0.32 does not do."""
    with pytest.raises(NotImplementedError, match="Intermediate size padding"):
        Experts.random(256, 48).converted(backend, SILU)


@pytest.mark.parametrize("sizes", [*SIZES, (256, 48), (320, 208)], ids=str)
def test_cutedsl(sizes: tuple[int, int]) -> None:
    """Up and gate alternate by 64 rows; everything is padded to whole tiles of the GEMMs."""
    experts = Experts.random(*sizes)
    layer, (w13, w13_scale, _, inputs, w2, w2_scale, _, _) = experts.converted("FLASHINFER_CUTEDSL")
    hidden, inner = up(sizes[0], 256), up(sizes[1], 64)
    for got, gate, up_, columns in (
        (w13, experts.gate, experts.up, hidden // 2),
        (unswizzled(w13_scale), experts.gate_scale, experts.up_scale, hidden // 16),
    ):
        assert got.shape == (EXPERTS, 2 * inner, columns)
        pairs = got.reshape(EXPERTS, inner // 64, 2, 64, columns)
        for which, want in ((0, up_), (1, gate)):
            back = pairs[:, :, which].reshape(EXPERTS, inner, columns)
            assert torch.equal(back, padded(want, inner, columns))
    assert torch.equal(w2, padded(experts.down, hidden, inner // 2))
    assert torch.equal(unswizzled(w2_scale), padded(experts.down_scale, hidden, inner // 16))
    # The kernel is told the padded sizes, the runner the original one.
    config = layer.moe_config
    assert (config.hidden_dim, config.intermediate_size_per_partition) == (hidden, inner)
    assert config.hidden_dim_unpadded == sizes[0]
    assert inputs.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    "backend",
    [
        "VLLM_CUTLASS",
        "FLASHINFER_CUTEDSL",
        "FLASHINFER_CUTEDSL_BATCHED",
        "FLASHINFER_CUTLASS",
        "B12X",
        "EMULATION",
    ],
)
def test_whose_input_scales_a_kernel_is_said_to_take(backend: str) -> None:
    """By that the self-check rounds, and load balancing is refused."""
    _, converted = Experts.random(256, 128).converted(backend, SILU)
    own = len(converted[3].unique()) > 1
    assert own == (NvFp4MoeBackend(backend) in vllm_kernels._BY_EXPERT)


@pytest.mark.parametrize("sizes", [*SIZES, (256, 48)], ids=str)
@pytest.mark.parametrize("weight_only", [False, True])
def test_b12x(sizes: tuple[int, int], weight_only: bool) -> None:
    experts = Experts.random(*sizes)
    _, (w13, w13_scale, _, inputs, w2, w2_scale, _, _) = experts.converted(
        "B12X", SILU, weight_only
    )
    inner = up(sizes[1], 64)
    halves = [(experts.gate, experts.gate_scale), (experts.up, experts.up_scale)]
    if weight_only:
        halves.reverse()
    packed, scales = sizes[0] // 2, sizes[0] // 16
    want = torch.cat([padded(codes, inner, packed) for codes, _ in halves], 1)
    assert torch.equal(w13, want)
    assert_tiled(w13_scale, *(padded(scale, inner, scales) for _, scale in halves))
    assert torch.equal(w2, padded(experts.down, sizes[0], inner // 2))
    assert_tiled(w2_scale, padded(experts.down_scale, sizes[0], inner // 16))
    assert inputs.tolist() == ([1.0] * 3 if weight_only else [0.5, 2.0, 0.25])


def test_b12x_is_told_up_first_for_any_gate() -> None:
    """Why MiniMax-M3's gate is withheld from it, W4A16: vLLM hands up first (above) and says so,
    but b12x 1.5.1 takes this activation's weights as gate first whatever it is told
    (b12x/moe/fused_moe/_impl.py:1598). When this fails, read both again."""
    modes = importlib.import_module(f"{FUSED_MOE}.b12x")._B12X_MOE_MODES
    assert modes["nvfp4", None] == ("w4a16", "modelopt_nvfp4", "w13")  # w13: up, then gate
    experts = Experts.random(256, 64)
    _, (w13, *_) = experts.converted("B12X", M3, weight_only=True)
    assert torch.equal(w13[:, :64], experts.up)


@pytest.mark.parametrize("backend", ["EMULATION", "FLASHINFER_MOE_EP_CUTEDSL"])
def test_left_as_they_are(backend: str) -> None:
    experts = Experts.random(96, 48)
    _, (w13, w13_scale, w13_global, inputs, w2, w2_scale, w2_global, w2_inputs) = experts.converted(
        backend, SILU
    )
    assert torch.equal(w13, torch.cat((experts.gate, experts.up), 1))
    scales = torch.cat((bits(experts.gate_scale), bits(experts.up_scale)), 1)
    assert torch.equal(bits(w13_scale), scales)
    assert torch.equal(w2, experts.down) and torch.equal(bits(w2_scale), bits(experts.down_scale))
    assert torch.equal(w13_global, experts.w13_global)
    assert torch.equal(w2_global, experts.down_global)
    if backend == "EMULATION":  # one reciprocal for all experts
        assert inputs.item() == w2_inputs.item() == 1 / 2.0


# Largest block scale, as bits of E4M3: 448 (the rule ``max`` always has one), 1.0 and 2^-4.
@pytest.mark.parametrize("largest", [0x7E, 0x38, 0x18])
@pytest.mark.parametrize("sizes", [(256, 128), (128, 48), (192, 64)], ids=str)
def test_marlin_scales(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int], largest: int
) -> None:
    """Codes need a GPU; here they go through, padded. Beside 448, scales below 2^-6 become zero."""
    marlin = "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4"
    module = importlib.import_module(marlin)
    monkeypatch.setattr(module, "_repack_marlin_experts", lambda weight, *_: weight)
    experts = Experts.random(*sizes, largest=largest)
    _, (w13, w13_scale, w13_global, _, w2, w2_scale, w2_global, _) = experts.converted("MARLIN")
    hidden, inner = sizes
    grown = up(inner, 64 if hidden % 128 == 0 else 128)
    halves = [padded(codes, grown, hidden // 2) for codes in (experts.gate, experts.up)]
    assert torch.equal(w13, torch.cat(halves, 1))
    assert torch.equal(w2, padded(experts.down, hidden, grown // 2))

    for got, got_global, scales, globals_ in (
        (
            w13_scale,
            w13_global,
            torch.cat(
                [padded(s, grown, hidden // 16) for s in (experts.gate_scale, experts.up_scale)], 1
            ),
            experts.w13_global,
        ),
        (
            w2_scale,
            w2_global,
            padded(experts.down_scale, hidden, grown // 16),
            experts.down_global,
        ),
    ):
        # A bfloat16 made of a code's bits lacks 2^126, one of a scale's bits 2^-7.
        factors = globals_ * 2.0**119 / got_global
        factor = float(factors[0])
        assert torch.equal(factors, torch.full((EXPERTS,), factor)) and factor.is_integer()
        for expert in range(EXPERTS):
            want = scales[expert].view(torch.float8_e4m3fn).float()
            want[want * factor < 2**-6] = 0
            assert torch.equal(marlin_scales(got[expert], factor), want)
    assert factor == {0x7E: 1, 0x38: 256, 0x18: 4096}[largest]


def test_flashinfer_b12x_rounds_block_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last step is not a change of layout: block scale times global scale becomes E4M3 again,
    whose smallest value is 2^-9. docs/operators/backends.md says so; only ``--moe-backend`` selects
    it."""
    module = importlib.import_module(f"{FUSED_MOE}.experts.flashinfer_b12x_moe")
    monkeypatch.setattr(module, "flashinfer_convert_sf_to_mma_layout", lambda scale, **_: scale)
    experts = Experts.random(256, 64)
    _, tensors = experts.converted("FLASHINFER_B12X", SILU)
    layer: Any = torch.nn.Module()
    for first, name in ((1, "w13_weight_scale"), (5, "w2_weight_scale")):
        setattr(layer, name, torch.nn.Parameter(tensors[first], requires_grad=False))
        setattr(layer, f"{name}_2", torch.nn.Parameter(tensors[first + 1], requires_grad=False))
    quant_config = SimpleNamespace(
        quant_dtype="nvfp4", a2_gscale=torch.ones(EXPERTS), w1_scale=layer.w13_weight_scale,
        w2_scale=layer.w2_weight_scale, gemm1_clamp_limit=None, gemm1_alpha=None, gemm1_beta=None,
    )  # fmt: skip
    kernel = module.FlashInferB12xExperts(moe_config(SILU, experts=EXPERTS), quant_config)
    kernel.process_weights_after_loading(layer)
    assert torch.all(layer.w13_weight_scale_2 == 1)
    real = experts.up_scale.float() * experts.w13_global.view(-1, 1, 1)
    got = unswizzled(layer.w13_weight_scale)[:, :64].view(torch.float8_e4m3fn).float()
    small = real < 2**-6  # from there down E4M3 has multiples of 2^-9
    assert small.sum() > 1000
    assert torch.equal(got[small], (real[small] * 512).round() / 512)
