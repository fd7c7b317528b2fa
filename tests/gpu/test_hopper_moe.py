"""The Hopper kernel against experts in plain floats, from the same stored weights.

    pytest tests/gpu/test_hopper_moe.py [-k minimax]

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
from vllm_nvfp4_moe.kernels import hopper_moe
from vllm_nvfp4_moe.kernels.hopper_moe import KINDS

TOKENS = (1, 2, 3, 7, 16, 33, 64, 256, 1000, 8192)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def packed(gpu: torch.device, request: pytest.FixtureRequest) -> Packed:
    skip_elsewhere("hopper")
    return Packed.random(request.param, gpu)


def kinds(tokens: int) -> list[str]:
    """Kernels to try: each is right for any batch, but few experts' worth is enough for most."""
    return [name for name in KINDS if name != "few" or tokens <= 64]


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize("gate", GATES)
def test_as_the_reference(
    packed: Packed, gate: str, routing: str, measured: list[dict[str, Any]]
) -> None:
    for seed, tokens in enumerate(TOKENS):
        x, ids, weights = packed.batch(tokens, routing, seed)
        truth = packed.truth(x, ids, weights, gate)
        for use in kinds(tokens):
            poison(packed, x)
            out = hopper_moe.run(x, packed.experts, ids, weights, GATES[gate], use=use)
            found = error(out, truth)
            measured.append(
                {"shape": packed.shape.name, "backend": f"hopper {use}", "gate": gate,
                 "batch": f"{tokens} {routing}", "whole": found.whole, "token": found.token}
            )  # fmt: skip
            assert found.whole < BOUND, (tokens, use, found)
            again = hopper_moe.run(x, packed.experts, ids, weights, GATES[gate], use=use)
            assert torch.equal(out, again), (tokens, use)


@pytest.fixture(params=KINDS)
def use(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestCases(Cases):
    bound = BOUND
