"""The Hopper kernel's CUDA source on a CPU (``cuda_emulation.h``), against experts in plain floats.

All of ``hopper_moe.run`` takes part; what it gets of PyTorch's CUDA is replaced. Each case runs
twice, with two orders of CTAs, warps and copies: outputs must be equal, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.gates import Gate
from tests.gpu import reference
from tests.gpu.layer import Shape, error
from tests.gpu.packed import BOUND, GATES, Packed
from tests.plugin.emulation import CPU, Emulated, body, build
from vllm_nvfp4_moe.kernels import hopper_moe
from vllm_nvfp4_moe.kernels.hopper_moe import KINDS, Experts
from vllm_nvfp4_moe.kernels.jit import KernelError


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated"), body(hopper_moe), hopper_moe)


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(library, hopper_moe, monkeypatch)


SHAPES = [
    Shape("nano", 8, 384, 128, 2),
    # Neither a multiple of a tile; row tiles no multiple of two or four.
    Shape("pad-both", 8, 400, 48, 2),
    Shape("odd", 8, 512, 320, 2),
    # Of its columns there are more than the pipelines hold.
    Shape("deep", 3, 3264, 64, 2),
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def packed(request: pytest.FixtureRequest) -> Packed:
    return Packed.random(request.param, CPU)


@pytest.fixture(scope="module")
def small() -> Packed:
    return Packed.random(SHAPES[1], CPU)


@pytest.mark.parametrize("use", KINDS)
@pytest.mark.parametrize(
    ("tokens", "routing", "gate", "processors"),
    [
        (1, "uniform", "swiglu_oai", 132),
        (5, "uniform", "silu", 7),
        (40, "skewed", "swiglu_oai", 3),
        (300, "uniform", "silu", 5),
    ],
)
def test_as_the_reference(
    emulated: Emulated,
    packed: Packed,
    use: str,
    tokens: int,
    routing: str,
    gate: str,
    processors: int,
) -> None:
    x, ids, weights = packed.batch(min(tokens, 60) if use == "few" else tokens, routing)
    out = emulated.twice(
        x, packed.experts, ids, weights, GATES[gate], use=use, processors=processors
    )
    assert error(out, packed.truth(x, ids, weights, gate)).whole < BOUND


@pytest.mark.parametrize("processors", [1, 4])
@pytest.mark.parametrize(
    ("use", "counts"),
    [
        ("some", (64, 56, 41, 33, 32, 24, 9, 1, 65, 130, 0, 17)),
        ("many", (128, 97, 96, 80, 64, 48, 33, 16, 129, 1, 0, 257, 112)),
    ],
)
def test_every_size_of_tile_at_once(
    emulated: Emulated, use: str, counts: tuple[int, ...], processors: int
) -> None:
    packed = Packed.random(Shape("one choice", len(counts), 256, 128, 1), CPU)
    ids = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].unsqueeze(1)
    x, _, weights = packed.batch(len(ids))
    out = emulated.twice(
        x, packed.experts, ids, weights, GATES["silu"], use=use, processors=processors
    )
    assert error(out, packed.truth(x, ids, weights)).token < 2 * BOUND


@pytest.mark.parametrize("use", KINDS)
def test_one_hot_expert(emulated: Emulated, small: Packed, use: str) -> None:
    x, ids, weights = small.batch(150)
    ids = torch.tensor([7, 5], dtype=torch.int32).repeat(150, 1)
    out = emulated.twice(x, small.experts, ids, weights, GATES["silu"], use=use)
    assert error(out, small.truth(x, ids, weights)).whole < BOUND


@pytest.mark.parametrize("use", KINDS)
def test_choices_of_nobody(emulated: Emulated, small: Packed, use: str) -> None:
    """An expert of -1, with and without a map, adds nothing."""
    x, ids, weights = small.batch(20)
    ids[::3, 1] = -1
    silent = weights.masked_fill(ids < 0, 0)
    truth = small.truth(x, ids.clamp(min=0), silent)
    for local in (None, torch.arange(8, dtype=torch.int32)):
        out = emulated.run(x, small.experts, ids, weights, GATES["silu"], local=local, use=use)
        assert error(out, truth).whole < BOUND


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


@pytest.mark.parametrize("use", KINDS)
def test_half_of_the_experts_elsewhere(emulated: Emulated, small: Packed, use: str) -> None:
    """Two ranks' outputs add up to one's; a rank without a token gives zeros."""
    x, ids, weights = small.batch(33)
    total = torch.zeros(x.shape)
    for rank in range(2):
        mine = torch.arange(rank, 8, 2)
        local = torch.full((8,), -1, dtype=torch.int32)
        local[mine] = torch.arange(4, dtype=torch.int32)
        experts = Experts.pack(*(t[mine] for t in small.w13), *(t[mine] for t in small.w2))
        rest = ids, weights, GATES["silu"]
        total += emulated.twice(x, experts, *rest, local=local, use=use)
        nowhere = torch.full_like(local, -1)
        assert not emulated.run(x, experts, *rest, local=nowhere, use=use).count_nonzero()
    assert error(total, small.truth(x, ids, weights)).whole < BOUND


@pytest.mark.parametrize("use", KINDS)
def test_as_many_experts_as_there_can_be(emulated: Emulated, use: str) -> None:
    few = Packed.random(Shape("narrow", 8, 64, 32, 3), CPU)
    times = hopper_moe.MOST_EXPERTS // 8
    w13, w2 = (t.repeat(times, 1, 1, 1) for t in (few.experts.w13, few.experts.w2))
    globals13, globals2 = (g.repeat(times) for g in (few.experts.globals13, few.experts.globals2))
    experts = Experts(w13, w2, globals13, globals2, few.experts.hidden)
    x, ids, weights = few.batch(30)
    ids += 8 * torch.randint(times, ids.shape, dtype=torch.int32)
    ids[0, 0] += 8 * times - 8 - ids[0, 0] // 8 * 8
    out = emulated.run(x, experts, ids, weights, GATES["silu"], use=use)
    assert error(out, few.truth(x, ids % 8, weights)).whole < BOUND


def test_rows_apart_and_in_place(emulated: Emulated, small: Packed) -> None:
    """x may be a slice of wider rows, and the output may lie where x does."""
    x, ids, weights = small.batch(16)
    rest = ids, weights, GATES["silu"]
    expected = emulated.run(x, small.experts, *rest)
    wide = torch.full((16, x.shape[1] + 64), torch.nan, dtype=x.dtype)
    apart = wide[:, 8 : 8 + x.shape[1]]
    apart.copy_(x)
    assert torch.equal(emulated.run(apart, small.experts, *rest), expected)
    emulated.run(x, small.experts, *rest, out=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("use", KINDS)
def test_nan_comes_out(emulated: Emulated, small: Packed, use: str) -> None:
    """Of the token it went into, and of no other."""
    x, ids, weights = small.batch(16)
    expected = emulated.run(x, small.experts, ids, weights, GATES["swiglu_oai"], use=use)
    x[5, 3] = torch.nan
    out = emulated.run(x, small.experts, ids, weights, GATES["swiglu_oai"], use=use)
    assert out[5].isnan().all()
    others = torch.arange(16) != 5
    assert torch.equal(out[others], expected[others])


def test_gelu(emulated: Emulated, small: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    monkeypatch.setitem(reference.GATES, "gelu_tanh", lambda gate, up: gelu(gate) * up)
    x, ids, weights = small.batch(16)
    out = emulated.run(x, small.experts, ids, weights, Gate("gelu_tanh"))
    assert error(out, small.truth(x, ids, weights, "gelu_tanh")).whole < BOUND


RELEASE = """if (half == 0 && first == 0 && before >= 0 && lane == 0)
                    barrier_arrive(empty + 8 * before);"""


@pytest.mark.parametrize(
    ("part", "instead", "message"),
    [
        ("4 * WM);", "4 * WM + 1);", "some_gated: deadlock: .* waits for mbarrier"),
        ("mma_wait<1>", "mma_wait<2>", "A overwritten under an MMA"),
        # A stage is given back before its MMAs are done.
        (f"mma_wait<1>();\n                {RELEASE}", f"{RELEASE} mma_wait<1>();", "assert nan <"),
    ],
    ids=["barrier", "registers", "stage"],
)
def test_faults_are_found(
    part: str,
    instead: str,
    message: str,
    small: Packed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that what passes above means something."""
    source = body(hopper_moe)
    assert source.count(part) == 1
    library = build(tmp_path, source.replace(part, instead), hopper_moe)
    broken = Emulated(library, hopper_moe, monkeypatch)
    x, ids, weights = small.batch(150)
    with pytest.raises(AssertionError, match=message):
        out = broken.run(x, small.experts, ids, weights, GATES["silu"], use="some", processors=1)
        assert error(out, small.truth(x, ids, weights)).whole < BOUND
