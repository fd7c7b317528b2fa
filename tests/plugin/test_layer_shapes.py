"""Layers of many shapes, built without a model, against the reference of ``tests/gpu``.

The same builder and reference run on GPUs with vLLM's kernels (``tests/gpu/test_layer.py``); here
they run with this package's CPU kernels, at sizes that a GPU's kernels must pad among others, and
are themselves held against others' definitions.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.layer import PREACTIVATION, Case, Layer, Shape, build, error, start
from tests.gpu.reference import GATES, nearest_nvfp4, route, routed
from tests.plugin import reference as plain

SHAPES = [
    Shape("m3-nano", 32, 384, 128, 4),
    Shape("gpt-oss-quarter", 4, 2880, 720, 2),
    Shape("narrow", 8, 128, 48, 3),
    Shape("one-expert-a-token", 5, 256, 16, 1),
]
CPU = torch.device("cpu")
TOKENS = (1, 7, 64)

# Roundings of activations to bfloat16; with float32 there are none.
BOUNDS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (6e-3, 1.2e-2)}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    start(CPU, tmp_path_factory.mktemp("rank"))
    return Case(request.param, TOKENS, CPU, precision=torch.float64)


@pytest.fixture(scope="module", params=GATES)
def layer(case: Case, request: pytest.FixtureRequest) -> tuple[str, Layer]:
    return request.param, build(case.shape, request.param, case.w13, case.w2)


def test_below_the_router(case: Case, layer: tuple[str, Layer]) -> None:
    gate, built = layer
    for name, batch in case.batches.items():
        found = error(built.apply(*batch[:3]), case.truth(gate, name))
        whole, token = BOUNDS[torch.bfloat16]
        assert found.whole < whole and found.token < token, (name, found)


def test_the_whole_layer(case: Case, layer: tuple[str, Layer]) -> None:
    gate, built = layer
    batch = case.batches[f"{case.ROUTED} {gate}"]
    out = built.forward(batch.x, batch.logits)
    whole, token = BOUNDS[torch.bfloat16]
    found = error(out, case.truth(gate, f"{case.ROUTED} {gate}"))
    assert found.whole < whole and found.token < token, found
    compiled = torch.compile(built.forward, backend="eager")
    assert torch.equal(compiled(batch.x, batch.logits), out)


@pytest.mark.parametrize("gate", GATES)
def test_in_float32_nothing_is_rounded(gate: str, tmp_path) -> None:
    start(CPU, tmp_path)
    case = Case(SHAPES[2], TOKENS, CPU, torch.float32, torch.float64)
    built = build(case.shape, gate, case.w13, case.w2, dtype=torch.float32)
    whole, token = BOUNDS[torch.float32]
    for name, batch in case.batches.items():
        found = error(built.apply(*batch[:3]), case.truth(gate, name))
        assert found.whole < whole and found.token < token, (name, found)


def test_a_wrong_gate_is_far_outside_the_bounds(case: Case) -> None:
    for name in case.batches:
        silu, clamped = (case.truth(gate, name) for gate in ("silu", "swiglu_oai"))
        assert error(silu, clamped).whole > 0.3


def test_the_clamp_is_reached_and_the_routing_is_skewed(case: Case) -> None:
    batch = case.batches["64 uniform"]
    up = batch.x.double() @ case.w13.weight(0, torch.float64).T
    assert up.std().item() == pytest.approx(PREACTIVATION, rel=0.6)  # of expert 0's global scale
    assert 0.1 < (up.abs() > 7).double().mean() < 0.6
    counts = [
        case.batches[f"64 {routing}"].ids.flatten().bincount(minlength=case.shape.experts)
        for routing in Case.ROUTINGS
    ]
    assert counts[1][0] > counts[0].max()
    assert all(int(c.sum()) == 64 * case.shape.top_k for c in counts)


def test_the_reference_agrees_with_the_plugins(case: Case) -> None:
    """Another implementation, in float64, a token at a time."""
    shape, batch = case.shape, case.batches["7 skewed"]
    experts = [
        [*plain.dequantize(*(t[e] for t in case.w13)).chunk(2),
         plain.dequantize(*(t[e] for t in case.w2))]
        for e in range(shape.experts)
    ]  # fmt: skip
    other = plain.routed(batch.x, experts, batch.weights, batch.ids)
    assert error(case.truth("swiglu_oai", "7 skewed"), other).token < 1e-12


def test_nvfp4_rounding_is_what_vllm_documents() -> None:
    """vLLM's plain PyTorch version, which its Triton kernels are to match; ties included."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        ref_nvfp4_quant_dequant,
    )

    torch.manual_seed(0)
    steps = torch.arange(-26, 27).float() / 4
    ties = torch.cat((steps, torch.full((11,), 6.0))).view(-1, 16).bfloat16()
    for x in (ties, ties * 3, torch.randn(64, 256).bfloat16() * 20, torch.zeros(2, 32).bfloat16()):
        theirs = ref_nvfp4_quant_dequant(x, torch.tensor(1.0), 16)
        assert torch.equal(nearest_nvfp4(x).bfloat16(), theirs)


def test_emulation_loses_what_quantized_activations_lose(case: Case) -> None:
    """About a tenth for each of the two roundings of activations to 4 bits."""
    batch = case.batches["64 uniform"]
    out = routed(
        batch.x, case.w13, case.w2, batch.weights, batch.ids, "silu", torch.float64, emulated=True
    )
    assert 0.05 < error(out, case.truth("silu", "64 uniform")).whole < 0.25


def test_routing_by_hand() -> None:
    weights, ids = route(torch.tensor([[0.0, 4.0, 3.9, -9.0]]), 2, "swiglu_oai")
    # The bias, -0.3, -0.1, 0.1, 0.3, puts the third before the second.
    assert ids.tolist() == [[2, 1]]
    assert weights.sum().item() == pytest.approx(2.0)
    weights, ids = route(torch.tensor([[0.0, 4.0, 3.9, -9.0]]), 2, "silu")
    assert ids.tolist() == [[1, 2]]
    assert weights[0, 0] / weights[0, 1] == pytest.approx(2.718281828**0.1, rel=1e-5)
