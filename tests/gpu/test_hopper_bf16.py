"""The bf16 Hopper kernel against experts in plain floats, from the same stored weights.

    pytest tests/gpu/test_hopper_bf16.py [-k minimax]

Its weights are exact, its sums in float32, what lies between the GEMMs and each expert's output are
rounded to bf16: so errors are those of two roundings, 2^-9 each at most.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.hopper_cases import SHAPES, Cases, poison
from tests.gpu.layer import error, skip_elsewhere
from tests.gpu.packed import BOUND, GATES, Packed
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

KERNEL = KERNELS["bf16"]
TOKENS = (1, 2, 3, 7, 16, 33, 64, 256, 1000, 8192)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def packed(gpu: torch.device, request: pytest.FixtureRequest) -> Packed:
    skip_elsewhere("hopper")
    return Packed.random(request.param, gpu)


def shapes_to_try(tokens: int) -> list[TileShape]:
    """Each is right for any batch, but the smallest tiles take long for many tokens."""
    return [shape for shape in KERNEL.tile_shapes if shape.max_tokens > 8 or tokens <= 64]


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize("gate", GATES)
def test_as_the_reference(
    packed: Packed, gate: str, routing: str, measured: list[dict[str, Any]]
) -> None:
    for seed, tokens in enumerate(TOKENS):
        x, ids, weights = packed.batch(tokens, routing, seed)
        truth = packed.truth(x, ids, weights, gate)
        for tile_shape in shapes_to_try(tokens):
            poison(packed, x)
            out = KERNEL.run(x, packed.experts, ids, weights, GATES[gate], tile_shape=tile_shape)
            found = error(out, truth)
            measured.append(
                {"shape": packed.shape.name, "backend": f"hopper {tile_shape}", "gate": gate,
                 "batch": f"{tokens} {routing}", "whole": found.whole, "token": found.token}
            )  # fmt: skip
            assert found.whole < BOUND, (tokens, tile_shape, found)
            again = KERNEL.run(x, packed.experts, ids, weights, GATES[gate], tile_shape=tile_shape)
            assert torch.equal(out, again), (tokens, tile_shape)


@pytest.fixture(params=KERNEL.tile_shapes, ids=str)
def tile_shape(request: pytest.FixtureRequest) -> TileShape:
    shape: TileShape = request.param
    return shape


class TestCases(Cases):
    bound = BOUND
