"""The Hopper kernels for experts without a gate and with biases, against plain floats.

    pytest tests/gpu/test_hopper_forms.py [-k nemotron]

Bounds are those of ``test_hopper_bf16`` and ``test_hopper_fp8``; what is rounded is the same.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from benchmarks.moe_layer_table import MORE
from tests.gpu import reference, reference_fp8
from tests.gpu.hopper_cases import poison
from tests.gpu.layer import Shape, error, skip_elsewhere
from tests.gpu.packed import BOUND, GATES, RELU2, Packed
from tests.gpu.test_hopper_fp8 import BOUND as FP8_BOUND
from tests.gpu.test_hopper_fp8 import FEW as FP8_FEW
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

NEMOTRON, GPT_OSS = MORE["nemotron-3-nano"], MORE["gpt-oss-120b"]
SHAPES = [
    NEMOTRON,
    # 928 and 464 columns, of which the next multiples of 128 are 1024 and 512.
    dataclasses.replace(NEMOTRON.slice(2), name="nemotron-3-nano-tp2"),
    dataclasses.replace(NEMOTRON.slice(4), name="nemotron-3-nano-tp4"),
    Shape("nemotron-latent", 64, 1280, 2688, 6, RELU2),
    Shape("relu2-narrow", 8, 448, 48, 2, RELU2),
    Shape("relu2-biased", 16, 400, 80, 2, RELU2, biased=True),
    GPT_OSS,
    dataclasses.replace(GPT_OSS.slice(4), name="gpt-oss-120b-tp4"),
    Shape("biased-narrow", 8, 448, 48, 2, GATES["silu"], biased=True),
]
TOKENS = (1, 2, 7, 33, 64, 256, 1000, 8192)


def every(shapes: list[Shape]) -> Any:
    """A fixture's parameters: each of these shapes with each kernel."""
    params = list(itertools.product(shapes, KERNELS))
    return {"params": params, "ids": [f"{shape.name}-{kernel}" for shape, kernel in params]}


def random(shape: Shape, kernel: str, gpu: torch.device) -> Packed:
    skip_elsewhere("hopper")
    rule = {"bf16": reference.routed, "fp8": reference_fp8.routed}[kernel]
    return Packed.random(shape, gpu, KERNELS[kernel], rule, shape.biased)


@pytest.fixture(scope="module", **every(SHAPES))
def packed(gpu: torch.device, request: pytest.FixtureRequest) -> Packed:
    return random(*request.param, gpu)


@pytest.fixture(scope="module", **every([shape for shape in SHAPES if shape.biased]))
def biased(gpu: torch.device, request: pytest.FixtureRequest) -> Packed:
    return random(*request.param, gpu)


def bound(packed: Packed, tokens: int) -> float:
    if packed.kernel.activation_bits == 16:
        return BOUND
    # What the hardware's sums are off by is doubled where they are squared.
    square = 1.5 if packed.shape.gate == RELU2 else 1.0
    return square * (FP8_BOUND if tokens >= 16 else FP8_FEW)


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
def test_as_the_reference(packed: Packed, routing: str, measured: list[dict[str, Any]]) -> None:
    gate, kernel = packed.shape.gate, packed.kernel
    for seed, tokens in enumerate(TOKENS):
        x, ids, weights = packed.batch(tokens, routing, seed)
        weights[::3, 0] = 0  # nobody's, as where vLLM's router chose an expert that is none
        truth = packed.truth(x, ids, weights, gate.form)
        for tile_shape in kernel.tile_shapes:
            if tile_shape.max_tokens == 8 and tokens > 64:
                continue
            poison(packed, x)
            out = kernel.run(x, packed.experts, ids, weights, gate, tile_shape=tile_shape)
            found = error(out, truth)
            measured.append(
                {"shape": packed.shape.name, "backend": f"{kernel.name} {tile_shape}",
                 "gate": gate.form, "batch": f"{tokens} {routing}", "whole": found.whole,
                 "token": found.token}
            )  # fmt: skip
            assert found.whole < bound(packed, tokens), (tokens, tile_shape, found)
            again = kernel.run(x, packed.experts, ids, weights, gate, tile_shape=tile_shape)
            assert torch.equal(out, again), (tokens, tile_shape)


def test_graphs_give_the_same_bits(packed: Packed) -> None:
    x, ids, weights = packed.batch(16, "uniform", 0)
    gate, run = packed.shape.gate, packed.kernel.run
    eager = run(x, packed.experts, ids, weights, gate)
    with torch.cuda.stream(torch.cuda.Stream()):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(x, packed.experts, ids, weights, gate)
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, eager)


def test_nan_comes_out(packed: Packed) -> None:
    """Of the token it went into, and of no other."""
    x, ids, weights = packed.batch(16, "uniform", 5)
    x[3, 5] = torch.nan
    out = packed.kernel.run(x, packed.experts, ids, weights, packed.shape.gate)
    assert out[3].isnan().all()
    assert out[[i for i in range(16) if i != 3]].isfinite().all()


def test_biases_are_added_where_they_are_asked_for(biased: Packed) -> None:
    """Without ``w2``'s, as on all ranks of tensor parallelism but the first."""
    x, ids, weights = biased.batch(64, "uniform", 6)
    gate = biased.shape.gate
    experts = dataclasses.replace(biased.experts, bias2=None)
    out = biased.kernel.run(x, experts, ids, weights, gate)
    without = biased._replace(biases=(biased.biases[0], None))
    assert error(out, without.truth(x, ids, weights, gate.form)).whole < bound(biased, 64)
    assert error(out, biased.truth(x, ids, weights, gate.form)).whole > 0.07
