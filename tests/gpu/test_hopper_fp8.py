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
from vllm_nvfp4_moe.kernels import hopper_fp8
from vllm_nvfp4_moe.kernels.hopper_fp8 import KINDS

TOKENS = (1, 3, 16, 64, 256, 1000, 8192)
BOUND = 3e-2
FEW = 5e-2
"""With fewer than 16 tokens."""
COST = 0.09


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def packed(gpu: torch.device, request: pytest.FixtureRequest) -> Packed:
    skip_elsewhere("hopper")
    return Packed.random(request.param, gpu, hopper_fp8, reference_fp8.routed)


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize("gate", GATES)
def test_as_the_reference(
    packed: Packed, gate: str, routing: str, measured: list[dict[str, Any]]
) -> None:
    for seed, tokens in enumerate(TOKENS):
        x, ids, weights = packed.batch(tokens, routing, seed)
        truth = packed.truth(x, ids, weights, gate)
        unrounded = packed.exact(x, ids, weights, gate)
        for use in KINDS:
            poison(packed, x)
            out = hopper_fp8.run(x, packed.experts, ids, weights, GATES[gate], use=use)
            found, cost = error(out, truth), error(out, unrounded)
            measured.append(
                {"shape": packed.shape.name, "backend": f"hopper fp8 {use}", "gate": gate,
                 "batch": f"{tokens} {routing}", "whole": found.whole, "token": found.token,
                 "cost": cost.whole}
            )  # fmt: skip
            assert found.whole < (BOUND if tokens >= 16 else FEW), (tokens, use, found)
            assert cost.whole < COST, (tokens, use, cost)
            again = hopper_fp8.run(x, packed.experts, ids, weights, GATES[gate], use=use)
            assert torch.equal(out, again), (tokens, use)


@pytest.fixture(params=KINDS)
def use(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestCases(Cases):
    bound = BOUND
