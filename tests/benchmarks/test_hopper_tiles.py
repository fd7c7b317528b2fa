"""What the Hopper kernels choose, beside the times that all tile shapes took on an H200."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import hopper_tiles
from benchmarks.hopper_tiles import LAYERS, Layer, Point, sensible
from vllm_nvfp4_moe.kernels.hopper.choice import MOST_TOKENS
from vllm_nvfp4_moe.kernels.hopper.kernel import HopperKernel
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

RESULTS = Path(hopper_tiles.__file__).parent / "results"
MEASURED = [
    point
    for name in ("hopper_tiles-h200-2026-11-30.json", "hopper_tiles_slice-h200-2026-12-01.json")
    for point in json.loads((RESULTS / name).read_text())
]


def chosen(kernel: HopperKernel, layer: Layer, tokens: int) -> str:
    pairs = tokens * layer.shape.top_k / layer.ranks
    row_tiles = -(-2 * layer.shape.intermediate // 64)
    return str(kernel.choose_tile_shape(pairs, layer.experts, row_tiles))


def points(name: str, of: Callable[[float], bool]) -> list[Point]:
    """Those of batches with such a number of tokens an expert, and of the tile shapes there are."""
    kernel, found = KERNELS[name], []
    shapes = {str(shape) for shape in kernel.tile_shapes}
    layers = {str(layer): layer for layer in LAYERS}
    for one in MEASURED:
        layer, tokens = layers[one["layer"]], one["tokens"]
        if one["kernel"] == name and of(tokens * layer.shape.top_k / layer.shape.experts):
            ms = {shape: ms for shape, ms in one["ms"].items() if shape in shapes}
            choice = chosen(kernel, layer, tokens)
            found.append(Point(str(layer), name, tokens, 1.0, choice, ms))
    return found


@pytest.mark.parametrize(
    ("name", "of", "count", "mean", "worst"),
    [
        ("bf16", lambda each: each <= MOST_TOKENS, 88, 0.002, 0.08),
        ("fp8", lambda each: each <= MOST_TOKENS, 88, 0.0, 0.0),  # there is one alone
        ("bf16", lambda each: each > MOST_TOKENS, 38, 0.006, 0.07),
        ("fp8", lambda each: each > MOST_TOKENS, 38, 0.003, 0.04),
    ],
    ids=["bf16 decoding", "fp8 decoding", "bf16 prefill", "fp8 prefill"],
)
def test_the_choice_is_nearly_the_fastest(
    name: str, of: Callable[[float], bool], count: int, mean: float, worst: float
) -> None:
    found = points(name, of)
    lost = {f"{point.layer}, {point.tokens} tokens": 1 + point.lost for point in found}
    assert len(found) == count
    assert statistics.geometric_mean(lost.values()) <= 1 + mean
    assert max(lost.values()) <= 1 + worst, max(lost, key=lost.__getitem__)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_what_is_chosen_is_timed(layer: Layer) -> None:
    """At every count of tokens: else nothing could be said of the choice."""
    for kernel in KERNELS.values():
        for tokens in hopper_tiles.TOKENS:
            choice = chosen(kernel, layer, tokens)
            shape = next(shape for shape in kernel.tile_shapes if str(shape) == choice)
            assert sensible(shape, layer, tokens), (tokens, choice)
