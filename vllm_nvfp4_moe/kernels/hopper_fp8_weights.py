"""NVFP4 weights as the Hopper kernel with FP8 activations wants them (``hopper_fp8.cu``).

There a weight is rounded to E4M3: its E2M1 magnitude times its block's scale. In E4M3 a code plus 8
is twice the value, so of a scale's code ``c`` those of 0.5, 1, 2 and 4 times it follow exactly;
of 1.5, 3 and 6 times it by way of ``c'``, the code of 1.5 ``c`` rounded to nearest, ties to even.
For this all of ``c - 8`` to ``c' + 16`` must be normal and finite: each expert's scales are shifted
by the power of two that brings the largest as high as may be (:data:`LARGEST`). What is then
below :data:`SMALLEST`, less than 2^-10 of the largest, is raised by a power of two, and its codes
lowered by the same, rounded to nearest (ties to even codes): an error of less than 2^-13 of the
largest weight that the expert could have.

A stage is 64 rows by 128 columns: 4096 bytes of codes, then 512 of scales. For each of its two
chunks of 64 columns, codes are 16 bytes for each of a warpgroup's 128 threads: thread ``4 g + q``
of warp ``w`` has of the warp's rows ``g`` and ``g + 8`` the chunk's block ``q``, each in two words
of eight columns. Of a word's columns the first four have their signs in the highest bits of
nibbles 1, 3, 5 and 7, the last four in those of nibbles 0, 2, 4 and 6; in the nibbles' other bits
are, in order, the :data:`NUMBERS` of their magnitudes. Scales are 4 bytes for each thread: of each
chunk, rows ``g`` and ``g + 8``. A scale's sign bit says that ``c'`` is ``c + 5``, not ``c + 4``.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import pad

from vllm_nvfp4_moe.kernels.hopper_weights import (
    BLOCK,
    COLUMNS,
    ROWS,
    padded_columns,
    padded_rows,
    rows_in_order,
)

PACKED = ROWS * COLUMNS // 2 + ROWS * COLUMNS // BLOCK
"""Bytes of a stage."""

LARGEST = 105
"""Of a scale's codes: 72, six times which rounds to 448, E4M3's largest."""
SMALLEST = 16
"""Of a scale's codes: 2^-5, half of which is E4M3's smallest normal number."""

EXPONENT = 9
"""Bias of scales before the shift, so that none is subnormal; 7 is E4M3's."""

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = (4, 0, 1, 5, 2, 6, 3, 7)
"""Where in a thread's table each magnitude is: first those that follow from ``c``."""


@functools.cache
def _lowered(device: torch.device) -> torch.Tensor:
    """uint8 ``[6, 256]``: a byte of two codes once their magnitudes were halved so many times; five
    make them zero."""

    def code(code: int, times: int) -> int:
        value = MAGNITUDES[code & 7] / 2**times
        return code & 8 | min(range(8), key=lambda to: (abs(MAGNITUDES[to] - value), to % 2))

    bytes_ = [
        [code(byte & 15, times) | code(byte >> 4, times) << 4 for byte in range(256)]
        for times in range(6)
    ]
    return torch.tensor(bytes_, dtype=torch.uint8).to(device)


@functools.cache
def _words(device: torch.device) -> torch.Tensor:
    """int32 ``[4, 256]``: what each of four bytes, two codes, adds to its thread's word."""

    def place(code: int, column: int) -> int:
        sign = 8 * (column % 4) + (7 if column < 4 else 3)
        return NUMBERS[code & 7] << 4 * column | code >> 3 << sign

    words = [
        [place(byte & 15, 2 * i) | place(byte >> 4, 2 * i + 1) for byte in range(256)]
        for i in range(4)
    ]
    return torch.tensor(words).to(torch.int32).to(device)


def pack(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's matrix.

    Args:
        codes: uint8 ``[rows, columns / 2]``, the lower four bits the even column's.
        scales: E4M3 ``[rows, columns / 16]``, none negative or NaN.

    Returns:
        uint8 ``[row tiles, stages, PACKED]``, rows and columns that were added being zero, and
        float32 ``[]``: what the weights in it are to be multiplied by, a power of two.
    """
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    height, width = padded_rows(rows), padded_columns(columns)
    code, shift, raised, lit = _shifted(scales)
    # A block of scale zero has zeros, whatever its codes.
    codes = codes * lit.repeat_interleave(BLOCK // 2, 1)
    if bool((raised > 0).any()):
        times = raised.clamp(max=5).repeat_interleave(BLOCK // 2, 1)
        codes = _lowered(codes.device)[times, codes.int()]
    if (height, width) != (rows, columns):
        codes = pad(codes, (0, (width - columns) // 2, 0, height - rows))
        more = (0, (width - columns) // BLOCK, 0, height - rows)
        code = pad(code, more, value=SMALLEST)
    # [tile, warp, half of its 16, g, stage, chunk, q, MMA, of its four]
    byte = codes.view(height // ROWS, 4, 2, 8, width // COLUMNS, 2, 4, 2, 4).int()
    words = _words(codes.device)
    word = words[0][byte[..., 0]]
    for i in range(1, 4):
        word |= words[i][byte[..., i]]
    # -> [tile, stage, chunk, warp, g, q, half, MMA]
    packed_codes = word.permute(0, 4, 5, 1, 3, 6, 2, 7).contiguous().view(torch.uint8)
    mantissa = code & 7
    code = code | ((mantissa >= 1) & (mantissa <= 5)).to(torch.uint8) << 7
    # [tile, warp, half, g, stage, chunk, q] -> [tile, stage, warp, g, q, chunk, half]
    scale = code.view(height // ROWS, 4, 2, 8, width // COLUMNS, 2, 4)
    packed_scales = scale.permute(0, 4, 1, 3, 6, 5, 2).contiguous()
    tiles, stages = height // ROWS, width // COLUMNS
    packed = [packed_codes.view(tiles, stages, -1), packed_scales.view(tiles, stages, -1)]
    return torch.cat(packed, 2), torch.exp2((EXPONENT - 7 + shift).float().neg())


def _shifted(
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales' E4M3 codes after the expert's shift, uint8, all from SMALLEST to LARGEST; the shift,
    int32 ``[]``, in powers of two over EXPONENT's bias; by how many powers each was raised beside,
    int32; which are not zero, bool."""
    mantissa, exponent = torch.frexp(scales.float())  # mantissa in [0.5, 1)
    code = ((exponent - 1 + EXPONENT) * 8 + (mantissa * 16 - 8)).int()
    lit = mantissa != 0
    largest = torch.where(lit, code, 0).amax()
    shift = (LARGEST - largest).div(8, rounding_mode="floor")
    code = torch.where(lit, code + 8 * shift, SMALLEST)
    raised = (SMALLEST + 7 - code).clamp(min=0) // 8
    return (code + 8 * raised).to(torch.uint8), shift, raised, lit


def pack_experts(
    codes: torch.Tensor, scales: torch.Tensor, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """All experts' matrices, one after another: a copy of one's at a time.

    Args:
        codes: uint8 ``[experts, rows, columns / 2]``.
        scales: E4M3 ``[experts, rows, columns / 16]``.
        gated: as of ``hopper_weights.pack_experts``.

    Returns:
        uint8 ``[experts, row tiles, stages, PACKED]``, and float32 ``[experts]``: what each
        expert's weights in it are to be multiplied by.
    """
    packed, factors = None, []
    for expert in range(codes.shape[0]):
        matrix, factor = pack(*rows_in_order(codes[expert], scales[expert], gated))
        if packed is None:
            packed = matrix.new_empty(codes.shape[0], *matrix.shape)
        packed[expert] = matrix
        factors.append(factor)
    assert packed is not None
    return packed, torch.stack(factors)
