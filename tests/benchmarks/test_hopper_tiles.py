"""Which tables ``benchmarks.hopper_tiles`` makes of times."""

from __future__ import annotations

import math

import pytest

from benchmarks.hopper_tiles import LAYERS, Layer, sensible, variant
from benchmarks.hopper_tiles_table import Point, fitted, report, taken
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS


def point(each: float, **ms: float) -> Point:
    times = {name.removeprefix("t").replace("_", "+"): value for name, value in ms.items()}
    return Point("layer", "bf16", int(8 * each), 1.0, each, each, "128x256", times)


# Up to 90 tokens an expert one is the faster, then the other; a last one never is.
MEASURED = [
    point(each, t128x256=2 + each, t192x192=47 + each / 2, t256x128=200 + each)
    for each in (8, 16, 32, 64, 128, 256)
]
NAMES = ["128x256", "192x192", "256x128"]


def test_a_table_parts_where_times_cross() -> None:
    (most, first), last = fitted(MEASURED, lambda p: p.each, NAMES)
    assert 64 < most < 128
    assert (first, last) == ("128x256", (math.inf, "192x192"))
    assert all(taken([(most, first), last], p.each) == p.best for p in MEASURED)


def test_a_line_that_saves_next_to_nothing_is_left_out() -> None:
    even = [point(each, t128x256=1.0, t192x192=1.0005 - each / 1e6) for each in (8, 64, 900)]
    assert len(fitted(even, lambda p: p.each, NAMES)) == 1


def test_points_that_no_line_can_part_share_one() -> None:
    same = [point(64, t128x256=1, t192x192=3), point(64, t128x256=2, t192x192=1)]
    assert fitted(same, lambda p: p.each, NAMES) == [(math.inf, "128x256")]


def test_what_the_counter_costs_is_said() -> None:
    text = report([point(64, t128x256=1, t128x256_=1.1)])
    assert "128x256 by a counter: +10.00 % in the mean" in text
    assert "the present choice loses 0.00 %" in text


@pytest.mark.parametrize("name", KERNELS)
def test_both_variants_are_made_of_the_one_source(name: str) -> None:
    dealt, counted = (variant(name, on).source() for on in (False, True))
    assert dealt == counted.replace("TILES_BY_COUNTER = true", "TILES_BY_COUNTER = false")
    assert dealt != counted


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_what_is_chosen_is_timed(layer: Layer) -> None:
    """At every count of tokens: else nothing could be said of the choice."""
    shape = layer.shape
    for kernel in KERNELS.values():
        for tokens in (2**n for n in range(14)):
            pairs = tokens * shape.top_k / layer.ranks
            row_tiles = 2 * -(-shape.intermediate // 128) * 128 // 64
            chosen = kernel.choose_tile_shape(pairs, layer.experts, row_tiles, 132)
            assert sensible(chosen, layer, tokens), (tokens, chosen)
