"""Which tile shape is the fastest for a batch: a model of decoding, and tables for prefill.

Times of all tile shapes: ``benchmarks/results/hopper_tiles-h200-2026-11-30.json``, measured by
``benchmarks/hopper_tiles.py``; what became of them: docs/evidence/hopper-kernel-lab-book.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_nvfp4_moe.kernels.hopper.launch import TileShape

MOST_TOKENS = 48
"""Of an expert, up to which a batch is decoding: tiles of 64 tokens are the fastest."""

Products = Sequence[tuple[int, int]]
"""An expert's matrices, each as (tiles of 64 rows, columns), with padding."""

Costs = Sequence[tuple[TileShape, float]]
"""Tile shapes for decoding, each with the time of a multiprocessor for a row and column."""

Table = Sequence[tuple[float, TileShape]]
"""Tile shapes, each with the most tokens an expert for which it is taken, the least first; the last
number is infinite."""

WAVE = 0.9
"""The time of a wave beside that of its tiles' share of a memory that all multiprocessors use."""


def choose(
    decoding: Costs,
    prefill: Table,
    pairs: float,
    experts: int,
    products: Products,
    processors: int,
) -> TileShape:
    """The tile shape for a batch; arguments as of ``HopperKernel.choose_tile_shape``."""
    if pairs > MOST_TOKENS * experts:
        return next(shape for most, shape in prefill if pairs / experts <= most)
    return quickest(decoding, pairs, products, processors)


def quickest(costs: Costs, pairs: float, products: Products, processors: int) -> TileShape:
    """The tile shape with which decoding takes the least time, by a model; of equals the first.

    A multiprocessor computes a tile at a time, and all read from one memory. So a product takes as
    long as its waves of tiles, or as all of its weights at the memory's speed, whichever is longer:

        columns * cost * max(0.9 * waves * rows of a tile, pairs * rows / processors)
        waves = ceil(pairs * ceil(rows / rows of a tile) / processors)

    with a tile for each pair, as with few tokens nearly all are. Small tiles make waves that are
    fuller, and cost more. FP8's cost (of the small tile; the large one's is 1) and the 0.9 were
    fitted to an H200's times of eight layers on 2026-11-30, where they lose 0.03 % in the mean.
    With bf16's the kernels of that evening (two producers) lose 0.7 % in the mean of 19 batches
    where both were timed, at worst 10 %.

    Args:
        pairs: how many pairs of a token and an expert this rank will have.
        processors: the GPU's multiprocessors.
    """

    def time(shape: TileShape, cost: float) -> float:
        total = 0.0
        for row_tiles, columns in products:
            # Pairs may be a mean, and no whole number: what a sum's rounding adds is no wave.
            tiles = pairs * math.ceil(row_tiles / shape.row_groups)
            waves = math.ceil(tiles / processors - 1e-9)
            slowest = max(WAVE * waves * shape.row_groups, pairs * row_tiles / processors)
            total += columns * cost * slowest
        return total

    return min(costs, key=lambda one: time(*one))[0]
