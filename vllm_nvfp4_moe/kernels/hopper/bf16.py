"""The Hopper kernel with activations in bf16: the Python side of ``bf16.cu``."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from vllm_nvfp4_moe.kernels.hopper import bf16_weights
from vllm_nvfp4_moe.kernels.hopper.bf16_weights import Rows
from vllm_nvfp4_moe.kernels.hopper.kernel import HopperKernel
from vllm_nvfp4_moe.kernels.hopper.launch import Table, TileShape, first_of

TOKENS_8 = TileShape(8, row_groups=1, k_groups=4, token_step=8)
"""For one request: it has four times as many tiles as the next, so that more of the GPU works."""
TOKENS_64_NARROW = TileShape(64, row_groups=2, k_groups=1, token_step=8)
"""For decoding with slices and small experts: it has twice as many tiles as the next."""
TOKENS_64 = TileShape(64, row_groups=4, k_groups=1, token_step=8)
"""For decoding."""
TOKENS_128 = TileShape(128, row_groups=4, k_groups=1, token_step=8)
"""For prefill."""
TOKENS_192 = TileShape(192, row_groups=3, k_groups=1, token_step=16)
TOKENS_256 = TileShape(256, row_groups=2, k_groups=1, token_step=16)

BY_ROWS: Table = ((math.inf, TOKENS_64),)
"""Decoding: up to how many tiles of 64 rows a multiprocessor has of the first product."""
BY_TOKENS: Table = ((math.inf, TOKENS_128),)
"""Prefill: up to how many tokens an expert has."""


class Bf16Kernel(HopperKernel):
    """Multiplies the exact weights by bf16 activations, and adds up in float32."""

    name = "HOPPER (vllm_nvfp4_moe)"
    activation_bits = 16
    file = Path(__file__).with_suffix(".cu")
    tile_shapes = (TOKENS_8, TOKENS_64_NARROW, TOKENS_64, TOKENS_128, TOKENS_192, TOKENS_256)
    packed_columns = bf16_weights.CHUNK
    mma_element = "bf16"
    mma_columns = 16

    def pack_matrix(
        self, codes: torch.Tensor, scales: torch.Tensor, global_scales: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed = bf16_weights.pack_experts(codes, scales, rows)
        return packed, global_scales.float().contiguous()

    def choose_tile_shape(
        self, pairs: float, experts: int, row_tiles: int, processors: int
    ) -> TileShape:
        if pairs > 48 * experts:
            return first_of(BY_TOKENS, pairs / experts)
        # TOKENS_8 divides the work into four times as many tiles, and takes a fifth longer for as
        # much. It is the faster where that fills the GPU better, or saves a last wave that is
        # nearly empty.
        tiles = pairs * row_tiles
        waves = math.ceil(pairs * math.ceil(row_tiles / 4) / processors)
        if tiles <= 2 * processors or (pairs <= 8 and 1.2 * tiles < 4 * waves * processors):
            return TOKENS_8
        return first_of(BY_ROWS, tiles / processors)

    def workspace(
        self, rows: int, hidden: int, intermediate: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        x_tiles = torch.empty(rows * hidden, dtype=torch.bfloat16, device=device)
        middle_tiles = torch.empty(rows * intermediate, dtype=torch.bfloat16, device=device)
        # Once the first GEMM has read x, its memory takes each pair's output.
        return {"x_tiles": x_tiles, "middle_tiles": middle_tiles, "pair_outputs": x_tiles}
