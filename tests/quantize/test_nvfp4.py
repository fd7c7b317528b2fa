"""The number format and the scale rules, bit for bit against tables made from bit fields."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantize.nvfp4 import format as nvfp4
from quantize.nvfp4.scales import RULES
from quantize.nvfp4.scales.mse import REACH
from tests.quantize import reference
from tests.quantize.plain import plainly
from tests.quantize.reference import E2M1, E4M3, POSITIVE_E4M3

TINY = 2.0**-149
"""float32's smallest positive value: what any float32 result may be off by, however small it is."""


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy()


def e4m3(patterns: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(patterns, np.uint8)).view(torch.float8_e4m3fn)


def reference_packed(codes: np.ndarray) -> np.ndarray:
    """Bytes of codes, by shifts and sums of Python integers."""
    rows = [[low + 16 * high for low, high in zip(r[::2], r[1::2], strict=True)] for r in codes]
    return np.array(rows, np.uint8)


# -- reading ---------------------------------------------------------------------------------------


def test_every_code_with_every_scale_means_the_exact_product() -> None:
    # One row per scale, whose block holds all 16 codes: 126 x 16 products.
    codes = np.tile(np.arange(16), (len(POSITIVE_E4M3), 1))
    scales = np.array(POSITIVE_E4M3)[:, None]
    for exponent in (-120, -30, -1, 0, 5, 110):
        got = nvfp4.dequantize(
            torch.from_numpy(reference_packed(codes)), e4m3(scales), torch.tensor(2.0**exponent)
        )
        want = E2M1[codes] * E4M3[scales] * 2.0**exponent  # exact in float64 and in float32
        np.testing.assert_array_equal(got.double().numpy(), want)
        np.testing.assert_array_equal(np.signbit(got.numpy()), np.signbit(want))  # -0.0 too


@pytest.mark.parametrize("scale", [0.0123, 3.7e-5, 1.9e-20])
def test_any_global_scale_is_within_two_roundings(scale: float) -> None:
    codes = np.tile(np.arange(16), (len(POSITIVE_E4M3), 1))
    packed = reference_packed(codes)
    scales = np.array(POSITIVE_E4M3, np.uint8)[:, None]
    stored = torch.tensor(scale)
    got = nvfp4.dequantize(torch.from_numpy(packed), e4m3(scales), stored)
    want = reference.dequantize(packed, scales, stored.item())
    np.testing.assert_allclose(got.double().numpy(), want, rtol=2 * 2.0**-24, atol=0)


def test_the_even_input_is_in_the_low_nibble() -> None:
    codes = torch.tensor([[0x1, 0xE, 0x0, 0xF]], dtype=torch.uint8)
    assert nvfp4.pack(codes).tolist() == [[0xE1, 0xF0]]
    decoded = nvfp4.decode(torch.tensor([[0xE1, 0xF0]], dtype=torch.uint8))
    assert decoded.tolist() == [[0.5, -4.0, 0.0, -6.0]]


def test_all_bytes_unpack_and_pack_again() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    np.testing.assert_array_equal(nvfp4.unpack(packed).numpy(), reference.unpack(packed.numpy()))
    assert torch.equal(nvfp4.pack(nvfp4.unpack(packed)), packed)


def test_experts_dimension_broadcasts() -> None:
    generator = np.random.default_rng(0)
    packed = generator.integers(0, 256, (3, 5, 16), dtype=np.uint8)
    scales = generator.integers(1, 127, (3, 5, 2), dtype=np.uint8)
    factors = np.array([0.5, 4.0, 2.0**-20], np.float32)
    got = nvfp4.dequantize(
        torch.from_numpy(packed), e4m3(scales), torch.from_numpy(factors).reshape(3, 1, 1)
    )
    for expert in range(3):
        want = reference.dequantize(packed[expert], scales[expert], factors[expert])
        np.testing.assert_array_equal(got[expert].double().numpy(), want)


# -- rounding --------------------------------------------------------------------------------------


def around(values: np.ndarray) -> np.ndarray:
    """``values`` as float32, with their neighbours on both sides."""
    values = np.asarray(values, np.float32)
    inf = np.float32(np.inf)
    return np.concatenate((values, np.nextafter(values, inf), np.nextafter(values, -inf)))


def test_e2m1_rounding_at_every_value_tie_and_neighbour() -> None:
    magnitudes = E2M1[:8]
    points = np.concatenate((magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2, [6.5, 1e30]))
    points = np.concatenate((around(points), np.linspace(0, 7, 1000, dtype=np.float32)))
    points = np.concatenate((points, -points))
    got = nvfp4.round_to_e2m1(torch.from_numpy(points))
    np.testing.assert_array_equal(got.numpy(), reference.nearest_e2m1(points))


def test_e4m3_rounding_at_every_value_tie_and_neighbour() -> None:
    table = E4M3[list(POSITIVE_E4M3)]
    points = np.concatenate((table, (table[1:] + table[:-1]) / 2, [480.0, 1e9, table[0] / 4]))
    points = np.concatenate((around(points), np.array([0.0, 1e-30, 3e38], np.float32)))
    got = nvfp4.round_to_e4m3(torch.from_numpy(points))
    np.testing.assert_array_equal(bits(got), reference.nearest_e4m3(points))


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_max_rule_is_bit_exact(dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(7)
    gate, up = (
        (
            torch.randn(48, 64, generator=generator)
            * torch.exp(spread * torch.randn(48, 64, generator=generator))
            * 0.02
        ).to(dtype)
        for _ in range(2)
    )
    up[3] = 0  # zero blocks
    gate[5, :16] = 1e-9  # a block far below the others: the smallest scale
    scale, wanted = reference.max_rule(gate.float().numpy(), up.float().numpy())
    results = plainly([gate, up], "max")
    for got, (codes, scales) in zip(results, wanted, strict=True):
        assert got.global_scale.dtype == torch.float32
        assert got.global_scale.shape == ()
        assert got.global_scale.item() == scale
        np.testing.assert_array_equal(bits(got.block_scale), scales)
        np.testing.assert_array_equal(got.codes.numpy(), reference_packed(codes))


def test_row_chunks_change_nothing() -> None:
    weight = torch.randn(37, 32, generator=torch.Generator().manual_seed(1))
    for rule in RULES:
        whole, parts = (plainly([weight], rule, rows)[0] for rows in (4096, 5))
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_zero_weights_stay_zero_with_usable_scales(rule: str, dtype: torch.dtype) -> None:
    for got in plainly([torch.zeros(4, 32, dtype=dtype)] * 2, rule):
        assert got.global_scale.item() == 1.0
        assert (bits(got.block_scale) >= 1).all()
        assert (bits(got.block_scale) <= 126).all()
        assert not got.dequantize().any()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_zero_blocks_stay_zero_beside_large_ones(rule: str) -> None:
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    weight[:, 16:32] = 0
    got = plainly([weight], rule)[0]
    assert (bits(got.block_scale) >= 1).all()
    assert not got.dequantize()[:, 16:32].any()


def test_the_largest_block_scale_is_448() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(3))
    weight[4, 100] = -17.0
    got = plainly([weight], "max")[0]
    assert E4M3[bits(got.block_scale)].max() == 448.0
    assert got.dequantize()[4, 100].item() == pytest.approx(-17.0, rel=1e-6)


FLOATS = {
    torch.float32: st.floats(allow_nan=False, allow_infinity=False, width=32),
    torch.float16: st.floats(allow_nan=False, allow_infinity=False, width=16),
    # Bits of a float32's upper half; exponent 255 is NaN and infinity.
    torch.bfloat16: st.integers(0, 0xFFFF).filter(lambda n: (n >> 7) & 0xFF != 0xFF),
}


@st.composite
def tensors(draw: st.DrawFn, largest: float = math.inf, smallest: float = 0.0) -> torch.Tensor:
    """``[1..2, 16..48]`` of mixed magnitudes, often with zeros, denormals and extremes."""
    dtype = draw(st.sampled_from(list(FLOATS)))
    shape = draw(st.integers(1, 2)), 16 * draw(st.integers(1, 3))
    count = shape[0] * shape[1]
    pool = draw(st.lists(FLOATS[dtype], min_size=1, max_size=24))
    if dtype == torch.bfloat16:
        values = torch.tensor(pool, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    else:
        values = torch.tensor(pool, dtype=dtype)
    if dtype == torch.float32 and draw(st.booleans()):
        values = values.sign() * draw(st.sampled_from([1e-30, 1e-10, 1.0, 1e20, 3e38]))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    picked = values[torch.randint(len(values), (count,), generator=noise)].reshape(shape)
    if draw(st.booleans()):  # fill in between, so that a block has more than a few values
        picked = (picked.float() * torch.rand(shape, generator=noise)).to(dtype)
    amax = picked.float().abs().max().item()
    assume(amax == 0 or smallest <= amax <= largest)
    return picked


def block_steps(got: nvfp4.NvFp4) -> np.ndarray:
    """Per element, the block's scale times the global one: what code 1.0 means."""
    return np.repeat(E4M3[bits(got.block_scale)], 16, axis=-1) * got.global_scale.double().item()


NORMAL = 6 * 448 * 2.0**-126
"""Below it ``amax / (6 * 448)`` is no normal float32, so that scales lose digits."""


@settings(max_examples=400, deadline=None)
@given(tensors())
def test_round_trip_is_within_half_a_grid_step(weight: torch.Tensor) -> None:
    for rule in ("max", "mse"):
        got = plainly([weight], rule)[0]
        step = block_steps(got)
        exact = weight.double().numpy()
        units = np.abs(exact) / step
        half = step * np.select([units <= 2, units <= 4], [0.25, 0.5], 1.0)
        slack = 2.0**-20 * np.abs(exact) + 16 * TINY
        error = np.abs(got.dequantize().double().numpy() - exact)
        inside = units <= 6
        assert (error <= half + slack)[inside].all()
        # What lies outside of the grid is its last value.
        clipped = np.copysign(6 * step, exact)
        np.testing.assert_allclose(
            got.dequantize().double().numpy()[~inside], clipped[~inside], rtol=1e-6, atol=16 * TINY
        )


@settings(max_examples=300, deadline=None)
@given(tensors(smallest=NORMAL))
def test_max_clips_by_no_more_than_its_scale_was_rounded(weight: torch.Tensor) -> None:
    got = plainly([weight], "max")[0]
    patterns = bits(got.block_scale).astype(int)
    blocks = np.abs(weight.double().numpy()).reshape(*patterns.shape, 16).max(-1)
    # Half a step above the chosen E4M3 value; nothing is above 448, so nothing rounds to it.
    upper = np.where(
        patterns == 126,
        448.0,
        (E4M3[patterns] + E4M3[np.minimum(patterns + 1, 126)]) / 2,
    )
    assert (blocks <= 6 * upper * got.global_scale.double().item() * (1 + 1e-6)).all()


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_scales_are_always_usable(weight: torch.Tensor) -> None:
    """Positive and finite, and so is the reciprocal that compressed-tensors stores."""
    for rule in ("max", "mse"):
        got = plainly([weight], rule)[0]
        patterns = bits(got.block_scale)
        assert ((patterns >= 1) & (patterns <= 126)).all()
        scale = got.global_scale
        assert torch.isfinite(scale)
        assert scale > 0
        assert torch.isfinite(scale.reciprocal())
        assert torch.isfinite(got.dequantize()).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_damaged_weights_show_in_the_global_scale(value: float, dtype: torch.dtype) -> None:
    """That is what the pipeline looks at to refuse them."""
    good = torch.randn(4, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    bad = good.clone()
    bad[2, 17] = value
    assert not torch.isfinite(nvfp4.global_scale(good, bad))


def test_bad_scales_are_found_among_good_ones() -> None:
    """Each E4M3 number, by what it is worth."""
    for byte in range(256):
        scales = torch.full((3, 8), 0x38, dtype=torch.uint8)  # 1.0
        scales[1, 5] = byte
        found = nvfp4.bad_scales(scales.view(torch.float8_e4m3fn))
        value = reference.E4M3[byte]
        what = "NaN" if math.isnan(value) else "zero" if value == 0 else "negative"
        good = value > 0
        assert found == (None if good else f"1 of 24 scales are {what}"), byte


# -- mse -------------------------------------------------------------------------------------------


def block_errors(weight: torch.Tensor, got: nvfp4.NvFp4) -> np.ndarray:
    """Sum of squared errors per block, float64, of what the stored numbers mean."""
    restored = reference.dequantize(
        got.codes.numpy(), bits(got.block_scale), got.global_scale.item()
    )
    error = (restored - weight.double().numpy()) ** 2
    return error.reshape(*got.block_scale.shape, 16).sum(-1)


def searched(weight: torch.Tensor, scale: float, start: np.ndarray, offsets: range) -> np.ndarray:
    """Least squared error per block over E4M3 scales ``offsets`` bit patterns from ``start``."""
    blocks = weight.double().numpy().reshape(*start.shape, 16)
    best = np.full(start.shape, np.inf)
    for offset in offsets:
        patterns = np.clip(start.astype(int) + offset, 1, 126)
        step = (E4M3[patterns] * scale)[..., None]
        error = (E2M1[reference.nearest_e2m1(blocks / step)] * step - blocks) ** 2
        best = np.minimum(best, error.sum(-1))
    return best


def random_blocks(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(96, 64, generator=generator)
    if kind == "heavy":
        weight = weight**3
    elif kind == "mixed":  # rows over twelve decades, down to the smallest scales
        weight *= 10 ** torch.linspace(-12, 0, 96)[:, None]
    elif kind == "bf16":
        weight = weight.bfloat16()
    return weight


KINDS = ["normal", "heavy", "mixed", "bf16"]


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_the_best_of_all_scales(kind: str) -> None:
    weight = random_blocks(kind)
    largest, got = (plainly([weight], rule)[0] for rule in ("max", "mse"))
    np.testing.assert_allclose(block_errors(weight, got), best_of_all(weight, got), rtol=1e-5)
    if kind != "mixed":  # most of whose blocks are at the smallest scale
        ours, theirs = (block_errors(weight, stored).sum() for stored in (got, largest))
        assert ours < 0.95 * theirs  # else it is the max rule


def best_of_all(weight: torch.Tensor, got: nvfp4.NvFp4) -> np.ndarray:
    lowest = np.ones(got.block_scale.shape, int)
    return searched(weight, got.global_scale.item(), lowest, range(126))


@st.composite
def blocks_for_a_scale(draw: st.DrawFn) -> torch.Tensor:
    """Blocks that some one E4M3 scale holds well, so that any of the 126 may be the best; the last
    one makes the global scale 1."""
    code = st.sampled_from(E2M1[:8].tolist())
    blocks = []
    for _ in range(draw(st.integers(4, 16))):
        scale = E4M3[draw(st.integers(1, 126) | st.integers(1, 24))]
        # The largest may be clipped, or be less than the scale could hold.
        values = [draw(code | st.floats(0, 12)), *draw(st.lists(code, max_size=4))]
        values = [*values, *[draw(code)] * 16][:16]
        spread = draw(st.sampled_from([0.0, 0.0, 0.05, 0.25]))
        noise = draw(st.integers(0, 2**31))
        off = np.random.default_rng(noise).uniform(-spread, spread, 16)
        blocks.append((scale * (np.array(values) + off)).tolist())
    return torch.tensor([*blocks, [2688.0] * 16]).clamp(-2688, 2688)


@settings(max_examples=150, deadline=None)
@given(blocks_for_a_scale())
def test_mse_is_the_best_of_all_scales_wherever_that_lies(weight: torch.Tensor) -> None:
    got = plainly([weight], "mse")[0]
    assert got.global_scale.item() == 1
    best = best_of_all(weight, got)
    ours = block_errors(weight, got)
    # The search is in float32, where a tie may round to either side.
    slack = 1e-12 * weight.double().square().amax(-1, keepdim=True).numpy()
    assert (ours <= best * (1 + 1e-5) + slack).all()


def test_no_other_scale_can_be_better() -> None:
    """The proof of ``mse``'s bounds, in integers. The unit is a quarter of E4M3's smallest value,
    so all values of grids, and all boundaries between them, are whole.

    Of two scales, ``other`` is never worse than ``scale`` for blocks with largest value ``a`` if it
    gains at ``a`` what it may lose at the 15 other values. Between the points where either rounds
    elsewhere, the difference of two squared errors is a straight line in each value. So losses are
    largest at such points, and as a function of ``a`` the sum is convex: it is negative in between
    if it is at both ends.
    """
    values = np.round(E4M3[:127] * 2048).astype(np.int64)
    assert (values == E4M3[:127] * 2048).all()

    def points(bits: int) -> np.ndarray:
        grid = np.round(E2M1[:8] * 2).astype(np.int64) * values[bits] // 2
        return np.union1d(grid, (grid[1:] + grid[:-1]) // 2)

    def error(bits: int, x: np.ndarray) -> np.ndarray:
        grid = np.round(E2M1[:8] * 2).astype(np.int64) * values[bits] // 2
        return np.abs(x[:, None] - grid).min(1) ** 2

    def never_better(bits: int, other: int, first: int, last: int) -> bool:
        """Whether ``other`` is never worse, for all ``a`` from ``first`` to ``last``."""
        turns = np.union1d(points(bits), points(other))
        ends = np.unique(np.concatenate(([first, last], turns[(turns > first) & (turns < last)])))
        x = np.unique(np.concatenate((turns, ends)))
        lost = error(other, x) - error(bits, x)
        most = np.maximum.accumulate(np.maximum(lost, 0))
        at = np.searchsorted(x, ends)
        return bool((lost[at] + 15 * most[at] <= 0).all())

    for start in range(1, 127):
        tried = range(
            max(start - REACH.below, 1), min(max(start + REACH.above, REACH.least), 126) + 1
        )
        # ``max`` rounds a / 6 to ``start``. No block is above 6 * 448 in units of the global scale.
        first = 3 * (values[start - 1] + values[start]) if start > 1 else 0
        last = 3 * (values[start] + values[start + 1]) if start < 126 else 6 * values[126]
        for bits in range(1, 127):
            if bits > tried[-1]:
                others = [bits - 8]  # half of it
            elif bits < tried[0]:
                others = [2 * bits if bits < 8 else bits + 8]  # twice it
                others = others if others[0] <= 126 else [*tried]
            else:
                continue
            # Step by step this leads to a scale that is tried, as no step goes beyond these.
            assert all(min(bits, tried[0]) <= other <= max(bits, tried[-1]) for other in others)
            assert any(never_better(bits, other, first, last) for other in others), (start, bits)


@pytest.mark.parametrize("kind", KINDS)
def test_four_six_is_the_better_of_its_two(kind: str) -> None:
    """By a plain search: the largest value at 6, or at 4."""
    weight = random_blocks(kind)
    got = plainly([weight], "four-six")[0]
    scale = got.global_scale.item()
    amax = weight.float().abs().unflatten(-1, (-1, 16)).amax(-1)
    both = []
    for target in (6.0, 4.0):
        start = bits(nvfp4.round_to_e4m3(amax / (target * got.global_scale)))
        both.append(searched(weight, scale, start, range(1)))
    np.testing.assert_allclose(block_errors(weight, got), np.minimum(*both), rtol=1e-4)
    if kind != "mixed":
        largest = plainly([weight], "max")[0]
        assert block_errors(weight, got).sum() < 0.97 * block_errors(weight, largest).sum()


# -- unbiased --------------------------------------------------------------------------------------


def exactly(got: nvfp4.NvFp4) -> np.ndarray:
    return reference.dequantize(got.codes.numpy(), bits(got.block_scale), got.global_scale.item())


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_is_as_long_as_the_weights_in_their_direction(kind: str) -> None:
    """By plain sums in float64, over both weights that share the scale."""
    weights = [random_blocks(kind), random_blocks("heavy") / 3]
    plain, got = (plainly(weights, rule) for rule in ("mse", "unbiased"))
    assert got[0].global_scale.item() == got[1].global_scale.item()
    for before, after in zip(plain, got, strict=True):
        assert torch.equal(before.codes, after.codes)
        np.testing.assert_array_equal(bits(before.block_scale), bits(after.block_scale))
    whole = np.concatenate([weight.double().numpy().ravel() for weight in weights])
    shrunk, kept = (np.concatenate([exactly(w).ravel() for w in each]) for each in (plain, got))
    assert shrunk @ whole < 0.998 * (whole @ whole)
    assert kept @ whole == pytest.approx(whole @ whole, rel=2e-7)
    lost = ((shrunk - whole) ** 2).sum()
    assert ((kept - whole) ** 2).sum() < 1.02 * lost


def test_unbiased_leaves_weights_that_come_out_exactly() -> None:
    grid = torch.tensor(E2M1[:8], dtype=torch.float32).repeat(4, 2)
    plain, got = (plainly([grid * 448], rule)[0] for rule in ("mse", "unbiased"))
    assert got.global_scale.item() == plain.global_scale.item()


@settings(max_examples=300, deadline=None)
@given(tensors(smallest=1e-12, largest=1e15))
def test_mse_is_never_worse_than_max(weight: torch.Tensor) -> None:
    largest, got = (plainly([weight], rule)[0] for rule in ("max", "mse"))
    ours, theirs = block_errors(weight, got), block_errors(weight, largest)
    # Below 1e-13 of the tensor's largest value, the search's squares leave float32.
    slack = 1e-5 * theirs + 16 * (1e-13 * weight.double().abs().max().item()) ** 2
    assert (ours <= slack + theirs).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e-18, 1e19, 1e25, 1e38])
def test_mse_does_not_depend_on_the_magnitude(magnitude: float) -> None:
    """Squares of such weights leave float32's range; the choice must not change."""
    exponent = round(math.log2(magnitude))
    weight = torch.rand(32, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    plain = plainly([weight], "mse")[0]
    scaled = plainly([torch.ldexp(weight, torch.tensor(exponent))], "mse")[0]
    np.testing.assert_array_equal(bits(scaled.block_scale), bits(plain.block_scale))
    assert torch.equal(scaled.codes, plain.codes)
