"""The Hopper kernel with activations in FP8: the Python side of ``fp8.cu``.

It is faster than the bf16 kernel where there is much to multiply, and less exact: before both GEMMs
activations are rounded to E4M3, with a scale for each token, and weights are rounded to E4M3 as
``fp8_weights.py`` says.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from vllm_nvfp4_moe.kernels.hopper import bf16_weights, fp8_weights
from vllm_nvfp4_moe.kernels.hopper.bf16_weights import Rows
from vllm_nvfp4_moe.kernels.hopper.choice import MOST_TOKENS, Table, choose
from vllm_nvfp4_moe.kernels.hopper.kernel import HopperKernel
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape

TOKENS_64 = TileShape(64, row_groups=4, k_groups=1, token_step=8)
"""For decoding."""
TOKENS_128 = TileShape(128, row_groups=4, k_groups=1, token_step=16)
TOKENS_192 = TileShape(192, row_groups=3, k_groups=1, token_step=16)

TABLE: Table = ((MOST_TOKENS, TOKENS_64), (96, TOKENS_128), (math.inf, TOKENS_192))


class Fp8Kernel(HopperKernel):
    """Multiplies weights by activations, both rounded to E4M3."""

    name = "HOPPER FP8 (vllm_nvfp4_moe)"
    activation_bits = 8
    file = Path(__file__).with_suffix(".cu")
    tile_shapes = (TOKENS_64, TOKENS_128, TOKENS_192)
    packed_columns = bf16_weights.STAGE
    mma_element = "e4m3"
    mma_columns = 32

    def pack_matrix(
        self, codes: torch.Tensor, scales: torch.Tensor, global_scales: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed, factors = fp8_weights.pack_experts(codes, scales, rows)
        return packed, global_scales.float() * factors

    def choose_tile_shape(self, pairs: float, experts: int, row_tiles: int) -> TileShape:
        return choose(TABLE, pairs, experts)

    def workspace(
        self, rows: int, hidden: int, intermediate: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        # FP8 takes the first half of it. Once the first GEMM has read that, each pair's output in
        # bf16 takes it all.
        x_tiles = empty(rows * hidden, torch.bfloat16)
        return {
            "x_tiles": x_tiles,
            "middle_rows": empty(rows * intermediate, torch.bfloat16),
            "middle_tiles": empty(rows * intermediate, torch.float8_e4m3fn),
            "pair_outputs": x_tiles,
            "x_scales": empty(rows, torch.float32),
            "middle_scales": empty(rows, torch.float32),
        }
