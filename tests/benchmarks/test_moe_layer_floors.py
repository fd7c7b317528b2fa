"""The floors of the layer benchmark: how fast a layer could be at best."""

from __future__ import annotations

import pytest

from benchmarks.moe_layer_table import MORE, SHAPES
from tests.benchmarks.moe_layers import M3
from vllm_nvfp4_moe.doctor.shape import floor


@pytest.mark.parametrize(
    ("tokens", "active", "ms", "bound"),
    [(1, 4, 0.0296, "memory"), (256, 128, 0.9481, "memory"), (8192, 128, 4.6972, "FLOPs")],
)
def test_floors_of_minimax_m3(tokens: int, active: int, ms: float, bound: str) -> None:
    found = floor(M3, tokens, active, 4.3, 790)
    assert found.ms == pytest.approx(ms, abs=1e-4) and found.bound == bound


def test_a_slice_has_its_part_of_the_floor() -> None:
    whole, part = (floor(shape, 512, 100, 4.3, 790) for shape in (M3, M3.slice(4)))
    assert part == pytest.approx([bound / 4 for bound in whole])
    assert (M3.slice(8).intermediate, M3.slice(8).tp) == (384, 8)


def test_both_numbers_of_the_floor_are_options() -> None:
    assert floor(M3, 8192, 128, 4.3, 1580).ms == pytest.approx(4.6972 / 2, abs=1e-4)
    assert floor(M3, 1, 4, 2.15, 790).ms == pytest.approx(2 * 0.0296, abs=2e-4)


def test_slices_are_of_whole_blocks() -> None:
    assert all(shape.divides(8) for shape in SHAPES.values())
    for name in ("nemotron-3-nano", "gpt-oss-120b"):
        assert [tp for tp in (1, 2, 4, 8) if MORE[name].divides(tp)] == [1, 2, 4]


def test_experts_without_a_gate_have_two_matrices() -> None:
    nano = MORE["nemotron-3-nano"]
    assert nano.weights == 2 * 2688 * 1856
    assert floor(nano, 1, 6, 4.3, 790).ms == pytest.approx(0.0078, abs=1e-4)
