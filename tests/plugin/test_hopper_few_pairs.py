"""Up to ``FEW_PAIRS`` pairs are routed and gathered by one launch (``route_and_gather``), more by
two.

Which of the two it was must not be seen: in tiles of one shape a token's output depends on nothing
but the token, so that each is the same, bit for bit, among few pairs and among many.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from tests.gpu.layer import Shape, error
from tests.gpu.packed import BOUND, GATES, Packed
from tests.plugin.emulation import CPU, Emulated, body, build
from vllm_nvfp4_moe.kernels.hopper.bf16 import TOKENS_8, TOKENS_64
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

KERNEL = KERNELS["bf16"]
FEW_PAIRS = 64
WIDE = Shape("wide", 4, 8448, 64, 2)
"""More columns than a CTA loads while it routes: 4 x 256 threads x 8."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = body(KERNEL)
    assert re.search(rf"FEW_PAIRS = {FEW_PAIRS};", source)
    assert re.search(r"AHEAD = 4;", source) and re.search(r"FEW_THREADS = 256;", source)
    return build(tmp_path_factory.mktemp("few"), source, KERNEL)


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(library, KERNEL, monkeypatch)


@pytest.fixture(scope="module")
def small() -> Packed:
    return Packed.random(Shape("small", 8, 256, 128, 2), CPU)


@pytest.fixture(params=[TOKENS_8, TOKENS_64], ids=str)
def tile_shape(request: pytest.FixtureRequest) -> TileShape:
    shape: TileShape = request.param
    return shape


def routings() -> dict[str, torch.Tensor]:
    """Experts of 60 tokens, of which each batch takes the first."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(60, 8, generator=generator).topk(2).indices.int()
    hot = torch.tensor([[5, 2]], dtype=torch.int32).repeat(60, 1)
    nobody = spread.clone()
    nobody[::4, 0] = -1
    nobody[2] = -1
    mixed = spread.clone()  # sizes of tiles that differ: most of one, few of others
    mixed[:, 0] = 6
    mixed[mixed[:, 1] == 6, 1] = 1
    return {"spread": spread, "one pair of experts": hot, "nobody's": nobody, "mixed": mixed}


@pytest.mark.parametrize("routing", list(routings()))
def test_a_token_is_the_same_among_few_and_among_many(
    emulated: Emulated, small: Packed, tile_shape: TileShape, routing: str
) -> None:
    ids = routings()[routing]
    x, _, weights = small.batch(60)
    run = {"tile_shape": tile_shape, "processors": 5}
    many = emulated.run(x, small.experts, ids, weights, GATES["silu"], **run)
    assert 2 * len(ids) > FEW_PAIRS
    truth = small.truth(x, ids.clamp(min=0), weights.masked_fill(ids < 0, 0))
    assert error(many, truth).whole < BOUND
    for tokens in (1, 3, 17, FEW_PAIRS // 2, FEW_PAIRS // 2 + 1):
        given = (x[:tokens], small.experts, ids[:tokens].contiguous(), weights[:tokens])
        few = emulated.twice(*given, GATES["silu"], **run)
        assert torch.equal(few, many[:tokens]), tokens


def test_experts_of_another_rank_and_weights_of_zero(
    emulated: Emulated, small: Packed, tile_shape: TileShape
) -> None:
    x, ids, weights = small.batch(20)
    weights[3] = 0
    weights[5, 1] = 0
    mine = torch.arange(1, 8, 2)
    local = torch.full((8,), -1, dtype=torch.int32)
    local[mine] = torch.arange(4, dtype=torch.int32)
    experts = small.kernel.pack(*(t[mine] for t in small.w13), *(t[mine] for t in small.w2))
    out = emulated.twice(
        x, experts, ids, weights, GATES["silu"], local=local, tile_shape=tile_shape
    )
    here = torch.where(ids % 2 == 1, weights, 0.0)
    assert error(out, small.truth(x, ids, here) + 1e-30).whole < BOUND
    assert not out[3].count_nonzero()


def test_rows_longer_than_a_cta_loads_at_once(emulated: Emulated) -> None:
    packed = Packed.random(WIDE, CPU)
    x, ids, weights = packed.batch(3)
    out = emulated.twice(x, packed.experts, ids, weights, GATES["silu"], tile_shape=TOKENS_8)
    assert error(out, packed.truth(x, ids, weights)).whole < BOUND
