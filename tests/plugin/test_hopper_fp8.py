"""The Hopper kernel with FP8 activations, against plain floats rounded as it should round.

Its weights are read back as its threads read them, and its CUDA source runs on a CPU
(``emulation.py``).

The reading is written from PTX's and E4M3's definitions; of the package it takes only what packs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.native.jit import KernelError
from tests.gpu import reference, reference_fp8
from tests.gpu.layer import error
from tests.gpu.packed import BOUND as BF16_BOUND
from tests.gpu.packed import GATES, Packed
from tests.gpu.reference import Stored
from tests.gpu.reference_fp8 import rounded
from tests.plugin.emulated_cases import SHAPES, Cases
from tests.plugin.emulation import CPU, Emulated, body, build
from vllm_nvfp4_moe.kernels.hopper import fp8_weights
from vllm_nvfp4_moe.kernels.hopper.bf16_weights import Rows
from vllm_nvfp4_moe.kernels.hopper.fp8 import TOKENS_64, TOKENS_128, TOKENS_192
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

KERNEL = KERNELS["fp8"]
BOUND = 4e-3
"""Against floats that are rounded alike: where sums differ in their last bits another E4M3 number
may be the nearest."""
COST = 0.08
"""Against unrounded floats: of rounding to E4M3, up to 1 in 16 for each factor of each product."""

# ---------------------------------------------------------------------------------------- weights


def e4m3(code: int) -> float:
    """The value of a byte that is no NaN."""
    assert code & 0x7F != 0x7F
    exponent, mantissa = code >> 3 & 15, code & 7
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if code & 0x80 else size


def bytes_of(word: int) -> list[int]:
    return list((word & 0xFFFFFFFF).to_bytes(4, "little"))


def held(stage: torch.Tensor) -> torch.Tensor:
    """A stage's weights ``[64, 128]``, float64, as 128 threads make them of it."""
    codes = stage[:4096].view(torch.int32).view(2, 128, 4).tolist()
    scales = stage[4096:].view(128, 4).tolist()
    weights = torch.full((64, 128), torch.nan, dtype=torch.float64)
    for thread in range(128):
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        for chunk in range(2):
            for half in range(2):  # rows g and g + 8
                scale = scales[thread][2 * chunk + half]
                one = scale & 0x7F
                three = one + 4 + (scale >> 7)
                # As bytes, none of which may be carried into the next: 0.5, 1, 2, 4; 0, 1.5, 3, 6.
                low = one * 0x01010101 + 0x1007FFF8
                high = three * 0x01010100 + 0x10080000
                assert bytes_of(low) == [one - 8, one, one + 8, one + 16]
                assert bytes_of(high) == [0, three, three + 8, three + 16]
                table = [e4m3(byte) for byte in bytes_of(low) + bytes_of(high)]
                for mma in range(2):
                    word = codes[chunk][thread][2 * half + mma] & 0xFFFFFFFF
                    for i in range(8):
                        value = table[word >> 4 * i & 7]
                        sign = word >> 8 * (i % 4) + (7 if i < 4 else 3) & 1
                        # In an MMA this is column 16 (i // 4) + 4 q + i % 4.
                        column = 64 * chunk + 16 * q + 8 * mma + i
                        weights[16 * warp + 8 * half + g, column] = -value if sign else value
    return weights


def read(packed: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """All of ``[row tiles, stages, bytes]``, times ``factor``, float32."""
    tiles = torch.cat([torch.cat([held(stage) for stage in tile], 1) for tile in packed])
    return (tiles * factor).float()


def stored(rows: int, columns: int, low: int = 0, high: int = 0x7F) -> Stored:
    """One expert; every code, and every block scale from byte ``low`` to ``high``."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(256, (1, rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(
        low, high, (1, rows, columns // 16), dtype=torch.uint8, generator=generator
    ).view(torch.float8_e4m3fn)
    return Stored(codes, scales, torch.ones(1))


@pytest.mark.parametrize(
    ("rows", "columns", "low", "high"),
    [
        (64, 128, 0, 0x7F),  # from zero to the largest: small ones are raised
        (128, 384, 0x20, 0x7F),
        (48, 64, 0, 9),  # subnormals, mostly
        (80, 208, 0x60, 0x63),
    ],
)
def test_a_thread_finds_its_weights(rows: int, columns: int, low: int, high: int) -> None:
    matrix = stored(rows, columns, low, high)
    codes, scales = matrix.codes[0], matrix.block_scale[0]
    found = read(*fp8_weights.pack(codes, scales))
    assert torch.equal(found[:rows, :columns], rounded(codes, scales))
    assert found.shape == (-(-rows // 64) * 64, -(-columns // 128) * 128)
    assert found[rows:].count_nonzero() == found[:, columns:].count_nonzero() == 0


@pytest.mark.parametrize("largest", range(1, 0x7F))
def test_every_largest_scale(largest: int) -> None:
    """With each, all scales up to it and all codes: nothing is carried or past 448 (:func:`held`),
    and what is off is within the bounds that the module states."""
    codes = torch.arange(16).repeat(128, 8).to(torch.uint8)
    scales = torch.arange(128).clamp(max=largest).to(torch.uint8).view(torch.float8_e4m3fn)
    scales = scales[:, None].repeat(1, 8)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    found = read(*fp8_weights.pack(packed, scales))
    assert torch.equal(found, rounded(packed, scales))
    magnitudes = torch.tensor(reference.MAGNITUDES)
    whole = torch.cat((magnitudes, -magnitudes)).repeat(8) * scales.float()[:, :1]
    top = float(scales.float().max())
    ordinary = (scales.float() >= top * 2.0**-10).repeat_interleave(16, 1)
    off = (found - whole).abs()
    assert bool((off[ordinary] <= whole.abs()[ordinary] / 16).all())
    assert float(off.max()) <= 6 * top / 16
    assert float(off[~ordinary].max() if (~ordinary).any() else 0) < 6 * top * 2.0**-13
    powers = magnitudes.log2().frac().abs() == 0
    exact = ordinary & (powers | (magnitudes == 0)).repeat(16)
    assert torch.equal(found[exact], whole[exact])


def test_nothing_but_zeros() -> None:
    """Of scales as of codes; no NaN comes of it."""
    codes, zeros = torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(64, 8)
    for scales in (zeros, zeros + 1):
        packed, factor = fp8_weights.pack(codes + 0x77, zeros.to(torch.float8_e4m3fn))
        assert not read(packed, factor).count_nonzero()
        packed, factor = fp8_weights.pack(codes, scales.to(torch.float8_e4m3fn))
        assert not read(packed, factor).count_nonzero()


@pytest.mark.parametrize("intermediate", [128, 96, 80])
def test_gate_and_up_meet_in_a_thread(intermediate: int) -> None:
    """Row g of a warp's 16 is gate's, row g + 8 the same row of up; padding gives nothing."""
    matrix = stored(2 * intermediate, 128)
    packed, factors = fp8_weights.pack_experts(matrix.codes, matrix.block_scale, Rows.GATE_AND_UP)
    truth = rounded(matrix.codes[0], matrix.block_scale[0])
    warps = read(packed[0], factors[0]).unflatten(0, (-1, 2, 8))
    gate, up = warps[:, 0].flatten(0, 1), warps[:, 1].flatten(0, 1)
    assert torch.equal(gate[:intermediate], truth[:intermediate])
    assert torch.equal(up[:intermediate], truth[intermediate:])
    assert len(gate) == (intermediate + 31) // 32 * 32
    assert gate[intermediate:].count_nonzero() == up[intermediate:].count_nonzero() == 0


def test_experts_are_shifted_apart() -> None:
    first, second = stored(128, 128, 0x10, 0x30), stored(128, 128, 0x60, 0x7F)
    # Of each 16 rows the MMA's are in an order of their own.
    order = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    codes = torch.cat([first.codes, second.codes])
    scales = torch.cat([m.block_scale.view(torch.uint8) for m in (first, second)])
    scales = scales.view(torch.float8_e4m3fn)
    packed, factors = fp8_weights.pack_experts(codes, scales, Rows.OF_ONE)
    assert factors[0] != factors[1]
    assert torch.equal(factors.log2(), factors.log2().round())
    for expert in range(2):
        weight = rounded(codes[expert], scales[expert])
        found = read(packed[expert], factors[expert])
        assert torch.equal(found, weight.unflatten(0, (-1, 16))[:, order].flatten(0, 1))


# ------------------------------------------------------------------------------------- the kernel


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated"), body(KERNEL), KERNEL)


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(library, KERNEL, monkeypatch)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def packed(request: pytest.FixtureRequest) -> Packed:
    return Packed.random(request.param, CPU, KERNEL, reference_fp8.routed)


@pytest.fixture(scope="module")
def small() -> Packed:
    return Packed.random(SHAPES[1], CPU, KERNEL, reference_fp8.routed)


@pytest.fixture(params=KERNEL.tile_shapes, ids=str)
def tile_shape(request: pytest.FixtureRequest) -> TileShape:
    shape: TileShape = request.param
    return shape


class TestCases(Cases):
    bound = BOUND
    token_bound = 3 * BOUND
    cost = COST

    def test_infinity_comes_out_as_nan(
        self, emulated: Emulated, small: Packed, tile_shape: TileShape
    ) -> None:
        """There is no scale for such a token."""
        self.test_nan_comes_out(emulated, small, tile_shape, torch.inf)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_token_has_its_own_scale(emulated: Emulated, small: Packed, scale: float) -> None:
    """Another's size does not matter; one of nothing but zeros, or of next to nothing, is none."""
    x, ids, weights = small.batch(16)
    expected = emulated.run(x, small.experts, ids, weights, GATES["silu"])
    x[3] *= scale
    x[5], x[6] = 0, 1e-39
    out = emulated.run(x, small.experts, ids, weights, GATES["silu"])
    assert error(out[3:4], small.truth(x[3:4], ids[3:4], weights[3:4])).whole < BOUND
    assert not out[5].count_nonzero()
    assert float(out[6].abs().max()) < 1e-30
    others = [i for i in range(16) if i not in (3, 5, 6)]
    assert torch.equal(out[others], expected[others])


def test_arguments_are_looked_at(emulated: Emulated, small: Packed) -> None:
    """By what looks at the other kernel's, each of them (``test_hopper_emulated``)."""
    x, ids, weights = small.batch(4)
    for message, arguments in (
        ("x must be .*bfloat16", (x.float(), small.experts, ids, weights)),
        ("ids must be .*int32", (x, small.experts, ids.long(), weights)),
        ("weights must be .*float32", (x, small.experts, ids, weights.bfloat16())),
        ("must have .* columns", (torch.cat((x, x), 1), small.experts, ids, weights)),
    ):
        rest: Any = arguments
        with pytest.raises(KernelError, match=message):
            emulated.run(*rest, GATES["silu"])
    assert emulated.run(x[:0], small.experts, ids[:0], weights[:0], GATES["silu"]).shape[0] == 0


def test_which_tile_shape_is_for_what() -> None:
    def chosen(pairs: float) -> TileShape:
        return KERNEL.choose_tile_shape(pairs, 128, 96)

    assert chosen(0.5) == chosen(128 * 48) == TOKENS_64
    assert chosen(128 * 48 + 1) == chosen(128 * 96) == TOKENS_128
    assert chosen(128 * 96 + 1) == chosen(10_000_000) == TOKENS_192


def test_the_bf16_kernel_is_the_more_exact(
    emulated: Emulated, small: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What FP8 costs is its own rounding, not the harness's."""
    other = Packed.random(small.shape, CPU)
    kernel = KERNELS["bf16"]
    bf16 = Emulated(build(tmp_path, body(kernel), kernel), kernel, monkeypatch)
    x, ids, weights = small.batch(40)
    exact = small.exact(x, ids, weights)
    ours = emulated.run(x, small.experts, ids, weights, GATES["silu"])
    theirs = bf16.run(x, other.experts, ids, weights, GATES["silu"])
    assert error(theirs, exact).whole < BF16_BOUND < error(ours, exact).whole
