"""NVFP4 weights in the order in which the bf16 Hopper kernel's threads hold them (``bf16.cu``).

A chunk is 64 rows by 64 columns: 2048 bytes of codes, then 256 bytes of block scales.

The codes are 16 bytes for each of a warpgroup's 128 threads, a 32-bit word for each of four MMAs
(16 columns, one block). Of the warp's 16 rows and the MMA's 16 columns, thread ``4 g + q`` of warp
``w`` holds in the A operand rows ``g`` and ``g + 8``, columns ``2 q``, ``2 q + 1`` and those plus 8
(PTX, "Register Fragments for wgmma.mma_async.m64nNk16"). These are four registers of two codes, one
code in each half of the word. :data:`PLACES` says where each register's codes lie in their half: so
that few instructions bring them to a bf16's sign, exponent and mantissa.

The scales are 8 bytes for each ``w`` and ``g``: two 32-bit words of two blocks each, row ``g``'s in
the lower half. In a half, the first block's scale is bits 11 to 4; the second's is there once the
bytes are swapped. Scales have five bits of exponent and no sign. With E4M3's four bits small scales
would be subnormal, and take more instructions; and no block scale is negative.
"""

from __future__ import annotations

import functools
from enum import Enum

import torch

GROUP_ROWS = 64
"""Rows of weights that a warpgroup works on."""
CHUNK = 64
"""Columns that are packed together."""
STAGE = 128
"""Columns of a stage of the kernel's pipeline, to a multiple of which matrices are padded."""
BLOCK = 16
CODE_BYTES = GROUP_ROWS * CHUNK // 2
CHUNK_BYTES = CODE_BYTES + GROUP_ROWS * CHUNK // BLOCK
"""Bytes of a chunk."""

PLACES = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (13, 11, 10, 14))
"""For each register, where in a half a code's four bits lie, the sign first."""

EXPONENT = 9
"""Bias of the scales' five bits of exponent: E4M3's smallest power of two is 2^-9."""


class Rows(Enum):
    """What a matrix's rows are, from which follows their order (:func:`in_order`)."""

    GATE_AND_UP = "all of gate, then all of up: w13 of gated experts"
    OF_ONE = "w2, and w13 of experts without a gate"


def padded_rows(rows: int) -> int:
    """The next multiple of 64."""
    return -(-rows // GROUP_ROWS) * GROUP_ROWS


def padded_columns(columns: int) -> int:
    """The next multiple of 128."""
    return -(-columns // STAGE) * STAGE


def gate_and_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Put rows of gate and of up together: 8 of gate, 8 of up, 8 of gate and so on."""
    return torch.stack([gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))], 1).flatten(0, 2)


def side_by_side(tensor: torch.Tensor) -> torch.Tensor:
    """Reorder rows ``[16 n, ...]`` so that four rows in a row become rows ``2 q``, ``2 q + 1`` of
    the MMA and those plus 8: a thread has these once its sums are transposed."""
    return tensor.unflatten(0, (-1, 4, 2, 2)).transpose(1, 2).flatten(0, 3)


def in_order(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Bring the rows of one expert's matrix, ``[rows, ...]``, into the order of the MMA's: that of
    :func:`gate_and_up` for those, else of :func:`side_by_side`."""
    if rows is Rows.GATE_AND_UP:
        return gate_and_up(*tensor.chunk(2))
    return side_by_side(tensor)


def packed_biases(biases: torch.Tensor, rows: Rows) -> torch.Tensor:
    """All experts' biases ``[experts, rows]`` in the order of the packed rows, float32, with zeros
    for padding."""
    packed = in_order(biases.float().T, rows).T
    more = padded_rows(biases.shape[1]) - biases.shape[1]
    return torch.nn.functional.pad(packed, (0, more)).contiguous()


def pack(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Pack one expert's matrix.

    Args:
        codes: uint8 ``[rows, columns / 2]``, the lower four bits the even column's.
        scales: E4M3 ``[rows, columns / 16]``, none negative or NaN.

    Returns:
        uint8 ``[row tiles, chunks, CHUNK_BYTES]``; rows and columns that were added are zero.
    """
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    height, width = padded_rows(rows), padded_columns(columns)
    exponent = _five_bits(scales)
    # A block of scale zero has zeros, whatever its codes.
    lit = scales.view(torch.uint8).bitwise_and(0x7F) != 0
    codes = codes * lit.repeat_interleave(BLOCK // 2, 1)
    if (height, width) != (rows, columns):
        codes = torch.nn.functional.pad(codes, (0, (width - columns) // 2, 0, height - rows))
        exponent = torch.nn.functional.pad(
            exponent, (0, (width - columns) // BLOCK, 0, height - rows)
        )
    # Of rows: tile, warp, half of its 16, g; of columns: chunk, MMA, half of its 16, q.
    byte = codes.view(height // GROUP_ROWS, 4, 2, 8, width // CHUNK, 4, 2, 4).int()
    lut = _words().to(codes.device)
    word = lut[0][byte[:, :, 0, :, :, :, 0]]
    for register, (row_half, column_half) in ((1, (1, 0)), (2, (0, 1)), (3, (1, 1))):
        word |= lut[register][byte[:, :, row_half, :, :, :, column_half]]
    # [tile, warp, g, chunk, MMA, q] -> [tile, chunk, warp, g, q, MMA]
    packed_codes = word.permute(0, 3, 1, 2, 5, 4).contiguous().view(torch.uint8)
    # [tile, warp, half, g, chunk, two MMAs, which]
    scale = exponent.view(height // GROUP_ROWS, 4, 2, 8, width // CHUNK, 2, 2)
    one, other = scale[..., 0], scale[..., 1]
    lower, upper = other >> 4 | (one & 15) << 4, one >> 4 | (other & 15) << 4
    packed_scales = torch.stack([lower, upper], -1).permute(0, 4, 1, 3, 5, 2, 6).contiguous()
    tiles, chunks = height // GROUP_ROWS, width // CHUNK
    return torch.cat(
        [
            packed_codes.view(tiles, chunks, CODE_BYTES),
            packed_scales.view(tiles, chunks, CHUNK_BYTES - CODE_BYTES),
        ],
        2,
    )


@functools.cache
def _words() -> torch.Tensor:
    """What a byte (two codes) adds to its thread's word: int32 ``[registers, 256]``.

    It stays on the host: on a GPU, level 2 of vLLM's sleep mode would discard it.
    """

    def place(code: int, places: tuple[int, ...]) -> int:
        return sum((code >> 3 - i & 1) << place for i, place in enumerate(places))

    words = [
        [place(byte & 15, places) | place(byte >> 4, places) << 16 for byte in range(256)]
        for places in PLACES
    ]
    return torch.tensor(words, device="cpu").to(torch.int32)


def _five_bits(scales: torch.Tensor) -> torch.Tensor:
    """E4M3 as uint8 with five bits of exponent over three of mantissa, no sign and no subnormals.

    What becomes of zero does not matter: blocks of scale zero have zero codes.
    """
    mantissa, exponent = torch.frexp(scales.float())  # mantissa in [0.5, 1)
    return ((exponent - 1 + EXPONENT) * 8 + (mantissa * 16 - 8)).clamp(0, 255).to(torch.uint8)


def pack_experts(codes: torch.Tensor, scales: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Pack all experts' matrices. Only one expert's is in memory twice at a time.

    Args:
        codes: uint8 ``[experts, rows, columns / 2]``.
        scales: E4M3 ``[experts, rows, columns / 16]``.
        rows: what these are.

    Returns:
        uint8 ``[experts, row tiles, chunks, CHUNK_BYTES]``.
    """
    tiles = padded_rows(codes.shape[1]) // GROUP_ROWS
    chunks = padded_columns(2 * codes.shape[2]) // CHUNK
    packed = codes.new_empty(codes.shape[0], tiles, chunks, CHUNK_BYTES)
    for expert in range(codes.shape[0]):
        packed[expert] = pack(*ordered(codes[expert], scales[expert], rows))
    return packed


def ordered(
    codes: torch.Tensor, scales: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`in_order` of one expert's codes and E4M3 block scales."""
    in_bytes = in_order(scales.view(torch.uint8), rows)
    return in_order(codes, rows), in_bytes.view(torch.float8_e4m3fn)
