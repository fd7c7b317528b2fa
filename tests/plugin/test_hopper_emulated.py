"""The bf16 Hopper kernel's CUDA source, run on a CPU, against experts in plain floats.

All of ``HopperKernel.run`` takes part; what it gets of PyTorch's CUDA is replaced
(``emulation.py``, ``cuda_emulation.h``). Each case runs twice, with two orders of CTAs, warps and
copies: outputs must be equal, bit for bit.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from quantize.native.jit import KernelError
from tests.gpu.layer import Shape, error
from tests.gpu.packed import BOUND, GATES, Packed
from tests.plugin.emulated_cases import SHAPES, Cases
from tests.plugin.emulation import CPU, Emulated, body, build
from vllm_nvfp4_moe.kernels.hopper import bf16_weights, kernel
from vllm_nvfp4_moe.kernels.hopper.bf16 import TOKENS_8, TOKENS_64, TOKENS_128, TOKENS_192
from vllm_nvfp4_moe.kernels.hopper.kernel import Experts
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

KERNEL = KERNELS["bf16"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated"), body(KERNEL), KERNEL)


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(library, KERNEL, monkeypatch)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def packed(request: pytest.FixtureRequest) -> Packed:
    return Packed.random(request.param, CPU)


@pytest.fixture(scope="module")
def small() -> Packed:
    return Packed.random(SHAPES[1], CPU)


@pytest.fixture(params=KERNEL.tile_shapes, ids=str)
def tile_shape(request: pytest.FixtureRequest) -> TileShape:
    shape: TileShape = request.param
    return shape


class TestCases(Cases):
    bound = BOUND
    token_bound = 2 * BOUND
    cost = BOUND


def test_arguments_are_looked_at(emulated: Emulated, small: Packed) -> None:
    """The kernel gets pointers: another dtype or order would be garbage."""
    x, ids, weights = small.batch(4)
    wide = torch.cat((x, x), 1)

    def refused(
        message: str, x: Any = x, ids: Any = ids, weights: Any = weights, **more: Any
    ) -> None:
        with pytest.raises(KernelError, match=message):
            emulated.run(x, small.experts, ids, weights, GATES["silu"], **more)

    refused("x must be .*bfloat16", x=x.float())
    refused("ids must be .*int32", ids=ids.long())
    refused("ids must be contiguous", ids=ids.T.contiguous().T)
    refused("weights must be .*float32", weights=weights.bfloat16())
    refused("out must be contiguous", out=wide[:, : x.shape[1]])
    refused("local must be .*int32", local=torch.arange(8))
    refused("aligned to 16 bytes", x=wide[:, 1 : 1 + x.shape[1]])
    refused("columns side by side", x=wide[:, ::2])
    refused("must have .* columns", x=wide)


def test_as_many_experts_as_there_can_be(emulated: Emulated, tile_shape: TileShape) -> None:
    few = Packed.random(Shape("narrow", 8, 64, 32, 3), CPU)
    times = kernel.MAX_EXPERTS // 8
    w13, w2 = (t.repeat(times, 1, 1, 1) for t in (few.experts.w13, few.experts.w2))
    scales13, scales2 = (
        s.repeat(times) for s in (few.experts.global_scales13, few.experts.global_scales2)
    )
    experts = Experts(w13, w2, scales13, scales2, few.experts.hidden)
    x, ids, weights = few.batch(30)
    ids += 8 * torch.randint(times, ids.shape, dtype=torch.int32)
    ids[0, 0] += 8 * times - 8 - ids[0, 0] // 8 * 8
    out = emulated.run(x, experts, ids, weights, GATES["silu"], tile_shape=tile_shape)
    assert error(out, few.truth(x, ids % 8, weights)).whole < BOUND


# On an H200: experts, hidden and intermediate size, k, tokens, and how many times as long TOKENS_64
# took as TOKENS_8. In other runs than those that the model was fitted to; with one producer a CTA,
# when TOKENS_8 took 7 % longer beside TOKENS_64 than since: what is no winner any more is not here.
MEASURED = [
    *[(128, 6144, 3072, 4, t, ratio) for t, ratio in ((1, 1.08), (2, 1.08), (4, 0.84), (8, 0.88))],
    *[(128, 6144, 1536, 4, t, ratio) for t, ratio in ((1, 1.33), (2, 1.06), (8, 0.87), (16, 0.85))],
    *[(128, 6144, 768, 4, t, ratio) for t, ratio in ((1, 1.86), (2, 1.30), (16, 0.90), (32, 0.82))],
    *[(128, 6144, 384, 4, t, ratio) for t, ratio in ((1, 1.93), (4, 1.20), (32, 0.75))],
    *[
        (128, 4096, 1536, 8, t, ratio)
        for t, ratio in ((4, 0.91), (8, 0.85), (16, 0.83), (32, 0.82))
    ],
    *[(128, 4096, 192, 8, t, ratio) for t, ratio in ((1, 1.61), (2, 1.46), (4, 1.06), (8, 0.78))],
    *[(256, 7168, 2048, 8, t, ratio) for t, ratio in ((1, 0.89), (2, 0.87), (4, 0.84), (32, 0.82))],
    *[(256, 7168, 1024, 8, t, ratio) for t, ratio in ((1, 1.26), (2, 0.87), (4, 0.82), (32, 0.81))],
    *[(256, 7168, 256, 8, t, ratio) for t, ratio in ((1, 1.78), (2, 1.58), (4, 1.06), (8, 0.72))],
    # With two producers (benchmarks/results/hopper_ab_bf16-h200-2026-11-30.json).
    *[(128, 6144, 3072, 4, t, ratio) for t, ratio in ((1, 1.12), (2, 1.17))],
    *[(8, 4096, 14336, 2, t, ratio) for t, ratio in ((1, 1.68), (2, 1.28))],
    *[(128, 4096, 1536, 8, t, ratio) for t, ratio in ((1, 1.05), (8, 0.91))],
    *[(128, 6144, 768, 4, t, ratio) for t, ratio in ((1, 1.87), (2, 1.33))],
    (64, 2048, 1024, 8, 1, 1.21),
]


@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate", "top_k", "tokens", "ratio"), MEASURED
)
def test_the_faster_tile_shape_is_chosen(
    experts: int, hidden: int, intermediate: int, top_k: int, tokens: int, ratio: float
) -> None:
    """Where the two were more than 5 % apart."""
    columns = bf16_weights.padded_columns(intermediate)
    products = [(2 * columns // 64, hidden), (hidden // 64, columns)]
    chosen = KERNEL.choose_tile_shape(tokens * top_k, experts, products, 132)
    assert chosen == (TOKENS_8 if ratio > 1 else TOKENS_64)


def test_which_tile_shape_is_for_what() -> None:
    def chosen(pairs: float, experts: int = 128) -> TileShape:
        return KERNEL.choose_tile_shape(pairs, experts, [(48, 4096), (64, 1536)], 132)

    assert chosen(6144) == TOKENS_64
    assert chosen(6145) == chosen(128 * 96) == TOKENS_128
    assert chosen(128 * 96 + 1) == chosen(128 * 768) == TOKENS_192
    assert chosen(128 * 768 + 1) == chosen(10_000_000) == TOKENS_128


def test_tiles_of_eight_tokens_are_for_as_many_pairs_as_were_measured() -> None:
    """However much fuller they would make waves: of tiny experts, a GPU with very many."""

    def chosen(pairs: float) -> TileShape:
        return KERNEL.choose_tile_shape(pairs, 128, [(4, 128), (2, 128)], 100_000)

    assert chosen(64) == TOKENS_8
    assert chosen(65) == TOKENS_64
