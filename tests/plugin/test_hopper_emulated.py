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
from vllm_nvfp4_moe.kernels.hopper import kernel
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


def test_which_tile_shape_is_for_what() -> None:
    def chosen(pairs: float, experts: int = 128, row_tiles: int = 96) -> TileShape:
        return KERNEL.choose_tile_shape(pairs, experts, row_tiles)

    assert chosen(0.5) == chosen(8) == chosen(8, 1) == TOKENS_8
    assert chosen(8.5) == chosen(9, 1) == chosen(6144) == TOKENS_64
    assert chosen(6145) == chosen(128 * 96) == TOKENS_128
    assert chosen(128 * 96 + 1) == chosen(128 * 192) == TOKENS_192
    assert chosen(128 * 192 + 1) == chosen(10_000_000) == TOKENS_128
    # Blocks of four row groups would be a fourth empty.
    for row_tiles in (2, 3, 5, 6, 9):
        assert chosen(10_000_000, row_tiles=row_tiles) == TOKENS_192
        assert chosen(128 * 96, row_tiles=row_tiles) == TOKENS_128
    for row_tiles in (4, 7, 8, 10, 11, 12, 29, 90):
        assert chosen(10_000_000, row_tiles=row_tiles) == TOKENS_128
