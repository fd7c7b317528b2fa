"""Which tile shape is the fastest for a batch: a table for each kernel, by tokens an expert.

The tables are read off the times of all tile shapes of eight layers on an H200,
``benchmarks/results/hopper_tiles-h200-2026-11-30.json`` (``benchmarks/hopper_tiles.py``), to which
bf16's choice loses 0.2 % in the mean and FP8's 0.1 %: see docs/evidence/hopper-kernel-lab-book.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_nvfp4_moe.kernels.hopper.launch import TileShape

MOST_TOKENS = 48
"""Of an expert, up to which a batch is decoding: tiles of 64 tokens are the fastest."""

Table = Sequence[tuple[float, TileShape]]
"""Tile shapes, each with the most tokens an expert for which it is taken, the least first; the last
number is infinite."""


def choose(table: Table, pairs: float, experts: int) -> TileShape:
    """The tile shape for a batch; arguments as of ``HopperKernel.choose_tile_shape``."""
    return next(shape for most, shape in table if pairs <= most * experts)
