"""The Hopper kernel with activations in bf16: the Python side of ``bf16.cu``."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from vllm_nvfp4_moe.kernels.hopper import bf16_weights
from vllm_nvfp4_moe.kernels.hopper.bf16_weights import Rows
from vllm_nvfp4_moe.kernels.hopper.choice import MOST_TOKENS, Table, choose
from vllm_nvfp4_moe.kernels.hopper.kernel import HopperKernel
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape

TOKENS_8 = TileShape(8, row_groups=1, k_groups=4, token_step=8)
"""For one request: it has four times as many tiles as the next, so that more of the GPU works."""
TOKENS_64 = TileShape(64, row_groups=4, k_groups=1, token_step=8)
"""For decoding."""
TOKENS_128 = TileShape(128, row_groups=4, k_groups=1, token_step=8)
TOKENS_192 = TileShape(192, row_groups=3, k_groups=1, token_step=16)

MOST_PAIRS = 8
"""Of a token and an expert, up to which ``TOKENS_8`` is taken. It was up to a fourth faster there,
and 4 % slower at most; with 16 pairs it is slower, or as fast."""
TABLE: Table = (
    (MOST_TOKENS, TOKENS_64),
    (96, TOKENS_128),
    (192, TOKENS_192),
    (math.inf, TOKENS_128),
)
NARROW: Table = (*TABLE[:2], (math.inf, TOKENS_192))
"""Where blocks of three row groups have fewer rows that are not there, as with the six of an expert
that is 192 wide: 7 % faster with 256 and 512 tokens an expert."""
FEWER = 0.9
"""Of the rows that ``TOKENS_128`` computes; all else being equal it is 2 % faster there."""


class Bf16Kernel(HopperKernel):
    """Multiplies the exact weights by bf16 activations, and adds up in float32."""

    name = "HOPPER (vllm_nvfp4_moe)"
    activation_bits = 16
    file = Path(__file__).with_suffix(".cu")
    tile_shapes = (TOKENS_8, TOKENS_64, TOKENS_128, TOKENS_192)
    packed_columns = bf16_weights.CHUNK
    mma_element = "bf16"
    mma_columns = 16

    def pack_matrix(
        self, codes: torch.Tensor, scales: torch.Tensor, global_scales: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packed = bf16_weights.pack_experts(codes, scales, rows)
        return packed, global_scales.float().contiguous()

    def choose_tile_shape(self, pairs: float, experts: int, row_tiles: int) -> TileShape:
        if pairs <= MOST_PAIRS:
            return TOKENS_8
        narrow = TOKENS_192.computed(row_tiles) <= FEWER * TOKENS_128.computed(row_tiles)
        return choose(NARROW if narrow else TABLE, pairs, experts)

    def workspace(
        self, rows: int, hidden: int, intermediate: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        x_tiles = torch.empty(rows * hidden, dtype=torch.bfloat16, device=device)
        middle_tiles = torch.empty(rows * intermediate, dtype=torch.bfloat16, device=device)
        # Once the first GEMM has read x, its memory takes each pair's output.
        return {"x_tiles": x_tiles, "middle_tiles": middle_tiles, "pair_outputs": x_tiles}
