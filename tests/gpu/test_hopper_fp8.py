"""The Hopper kernel with FP8 activations against plain floats, from the same stored weights.

    pytest tests/gpu/test_hopper_fp8.py [-k minimax]

Against floats that are rounded to E4M3 as it rounds them (``reference_fp8``), what is left is the
hardware's: it adds E4M3's products with about 14 bits, cut off, by which a sum of 6144 is off by
2e-3 (simulated); where that is rounded to E4M3 again, one number in fifty becomes its neighbour,
1e-2 in all. Where the largest of a token's numbers becomes another bf16, its scale does too, and
more of them change: seen, up to 1.9e-2 of 16 tokens and more, 3.6e-2 of a single one. Against
unrounded floats it is all that FP8 costs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu import reference_fp8
from tests.gpu.hopper_cases import SHAPES, Cases, poison
from tests.gpu.layer import error, skip_elsewhere
from tests.gpu.packed import GATES, Packed
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

KERNEL = KERNELS["fp8"]
TOKENS = (1, 3, 16, 64, 256, 1000, 8192)
BOUND = 3e-2
FEW = 5e-2
"""With fewer than 16 tokens."""
COST = 0.09


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def packed(gpu: torch.device, request: pytest.FixtureRequest) -> Packed:
    skip_elsewhere("hopper")
    return Packed.random(request.param, gpu, KERNEL, reference_fp8.routed)


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize("gate", GATES)
def test_as_the_reference(
    packed: Packed, gate: str, routing: str, measured: list[dict[str, Any]]
) -> None:
    for seed, tokens in enumerate(TOKENS):
        x, ids, weights = packed.batch(tokens, routing, seed)
        truth = packed.truth(x, ids, weights, gate)
        unrounded = packed.exact(x, ids, weights, gate)
        for tile_shape in KERNEL.tile_shapes:
            poison(packed, x)
            out = KERNEL.run(x, packed.experts, ids, weights, GATES[gate], tile_shape=tile_shape)
            found, cost = error(out, truth), error(out, unrounded)
            measured.append(
                {"shape": packed.shape.name, "backend": f"hopper fp8 {tile_shape}", "gate": gate,
                 "batch": f"{tokens} {routing}", "whole": found.whole, "token": found.token,
                 "cost": cost.whole}
            )  # fmt: skip
            assert found.whole < (BOUND if tokens >= 16 else FEW), (tokens, tile_shape, found)
            assert cost.whole < COST, (tokens, tile_shape, cost)
            again = KERNEL.run(x, packed.experts, ids, weights, GATES[gate], tile_shape=tile_shape)
            assert torch.equal(out, again), (tokens, tile_shape)


@pytest.fixture(params=KERNEL.tile_shapes, ids=str)
def tile_shape(request: pytest.FixtureRequest) -> TileShape:
    shape: TileShape = request.param
    return shape


class TestCases(Cases):
    bound = BOUND
