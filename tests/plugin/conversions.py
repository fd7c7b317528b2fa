"""Random NVFP4 experts, and the ways back from kernels' layouts, written from descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import (
    NvFp4MoeBackend,
    convert_to_nvfp4_moe_kernel_format,
)

from quantize.experts.gates import Gate
from tests.plugin.blackwell import ACTIVATION, M3, moe_config

EXPERTS = 3


@dataclass
class Experts:
    """``EXPERTS`` experts.

    Codes are uint8 ``[experts, rows, columns / 2]``, low nibble first; block scales float8_e4m3fn
    ``[experts, rows, columns / 16]``; global scales float32 ``[experts]``.
    """

    hidden: int
    inner: int
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    gate_scale: torch.Tensor
    up_scale: torch.Tensor
    down_scale: torch.Tensor
    w13_global: torch.Tensor
    down_global: torch.Tensor

    @classmethod
    def random(cls, hidden: int, inner: int, device: str = "cpu", largest: int = 0x7E) -> Experts:
        """Any code; any positive E4M3 scale up to the bit pattern ``largest``."""
        chance = torch.Generator().manual_seed(hidden * 1000 + inner)

        def codes(rows: int, columns: int) -> torch.Tensor:
            shape = (EXPERTS, rows, columns // 2)
            return torch.randint(0, 256, shape, generator=chance, dtype=torch.uint8).to(device)

        def scales(rows: int, columns: int) -> torch.Tensor:
            shape = (EXPERTS, rows, columns // 16)
            bits = torch.randint(1, largest + 1, shape, generator=chance, dtype=torch.uint8)
            bits[0, 0, 0] = largest
            return bits.view(torch.float8_e4m3fn).to(device)

        def globals_() -> torch.Tensor:
            return (torch.rand(EXPERTS, generator=chance) * 1e-3 + 1e-5).to(device)

        rows = ((inner, hidden), (inner, hidden), (hidden, inner))
        return cls(
            hidden, inner, *(codes(*r) for r in rows), *(scales(*r) for r in rows),
            globals_(), globals_(),
        )  # fmt: skip

    def converted(
        self, backend: str, gate: Gate = M3, weight_only: bool = False
    ) -> tuple[Any, tuple[Any, ...]]:
        """The layer, and vLLM's eight tensors of it, from the arguments that the plugin passes. Of
        a layer without a gate, ``up`` is all of w13."""
        config = moe_config(gate, experts=EXPERTS, hidden=self.hidden, inner=self.inner)
        w13 = (self.gate, self.up)[not gate.gated :]
        w13_scale = (self.gate_scale, self.up_scale)[not gate.gated :]
        layer = SimpleNamespace(
            activation=ACTIVATION[gate.form],
            moe_config=config,
            num_experts=EXPERTS,
            hidden_size=self.hidden,
            intermediate_size_per_partition=self.inner,
            params_dtype=torch.bfloat16,
        )
        inputs = torch.tensor([[0.5], [2.0], [0.25]], device=self.gate.device).repeat(1, len(w13))
        tensors: Any = convert_to_nvfp4_moe_kernel_format(
            nvfp4_backend=NvFp4MoeBackend(backend),
            layer=layer,
            w13=torch.cat(w13, 1),
            w13_scale=_cat(*w13_scale),
            w13_scale_2=self.w13_global.clone(),
            a13_scale=None if weight_only else inputs,
            w2=self.down.clone(),
            w2_scale=self.down_scale.clone(),
            w2_scale_2=self.down_global.clone(),
            a2_scale=None if weight_only else inputs[:, 0].clone(),
            is_act_and_mul=gate.gated,
            use_a16=weight_only,
        )
        return layer, tensors


def _cat(*scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([s.view(torch.uint8) for s in scales], 1).view(torch.float8_e4m3fn)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor of bytes."""
    return tensor.view(torch.uint8)


def padded(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bytes ``[experts, ...]`` with zeros after them, ``[experts, rows, columns]``."""
    grown = bits(tensor).new_zeros(EXPERTS, rows, columns)
    grown[:, : tensor.shape[1], : tensor.shape[2]] = bits(tensor)
    return grown


def unswizzled(scales: torch.Tensor) -> torch.Tensor:
    """Bytes in rows and columns from cuBLAS's tiled layout of block scales.

    Tiles of 128 rows and 4 columns lie one after the other, those of a band of 128 rows first. In a
    tile, row r and column c are byte ``r % 32 * 16 + r // 32 * 4 + c`` (cuBLAS, "1D Block Scaling
    Factors Layout").

    Args:
        scales: ``[experts, rows, columns]``, multiples of 128 and 4.
    """
    experts, rows, columns = scales.shape
    row = torch.arange(rows, device=scales.device).unsqueeze(1)
    column = torch.arange(columns, device=scales.device)
    tile = row // 128 * (columns // 4) + column // 4
    place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return bits(scales).reshape(experts, -1)[:, place.flatten()].reshape(experts, rows, columns)


def unshuffled(rows: torch.Tensor) -> torch.Tensor:
    """Rows in order from TRT-LLM's shuffle for an epilogue tile of 128.

    In each 32 rows, row s has gone to place ``s % 4 * 8 + s // 4`` (srcToDstBlk32RowMap in
    flashinfer/utils.py).

    Args:
        rows: ``[experts, rows, ...]``.
    """
    order = torch.empty(rows.shape[1], dtype=torch.long)
    for row in range(rows.shape[1]):
        block, s = divmod(row, 32)
        order[row] = 32 * block + s % 4 * 8 + s // 4
    return rows[:, order.to(rows.device)]


def marlin_codes(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Codes of one expert, uint8 ``[rows, columns]``, one a byte, from Marlin's layout.

    16 by 16 tiles of the transposed matrix, four of them together; of a thread's eight values,
    those that it dequantizes together are four apart (gptq_marlin_repack.cu).

    Args:
        packed: int32 ``[columns / 16, 2 * rows]``.
    """
    where = []
    for thread in range(32):
        tile = [
            16 * k + thread // 4 + 8 * half
            for half in (0, 1)
            for k in (thread % 4 * 2, thread % 4 * 2 + 1, thread % 4 * 2 + 8, thread % 4 * 2 + 9)
        ]
        where += [place + 256 * t for t in range(4) for place in tile]
    source = torch.tensor(where).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    nibbles = packed.unsqueeze(-1) >> torch.arange(0, 32, 4, device=packed.device) & 15
    blocks = nibbles.reshape(-1, 1024)
    flat = torch.empty_like(blocks)
    flat[:, source.to(packed.device)] = blocks
    tiles = flat.reshape(columns // 16, rows // 16, 16, 16).transpose(1, 2)
    return tiles.reshape(columns, rows).T.to(torch.uint8)


def marlin_scales(scales: torch.Tensor, factor: float) -> torch.Tensor:
    """Block scales of one expert, float32 ``[rows, columns]``, from Marlin's layout.

    A byte is the upper half of an unsigned float with five bits of exponent, of the scale times
    ``factor`` times 128; of 64 rows, eight of each eighth, and of each four the middle two swapped.

    Args:
        scales: float8_e4m3fn (by name) ``[columns, rows]``.
    """
    columns, rows = scales.shape
    halves = (bits(scales).to(torch.int16) << 7).view(torch.float16)
    values = (halves.float() / 128 / factor).reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1, 64)
    order = torch.tensor([first + 8 * each for first in range(8) for each in range(8)])
    flat = torch.empty_like(values)
    flat[:, order.to(scales.device)] = values
    return flat.reshape(columns, rows).T


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Of packed codes, one a byte, the low one first."""
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
