"""NVFP4 weights as the Hopper kernel with FP8 activations wants them (``fp8.cu``).

There a weight is rounded to E4M3: its E2M1 magnitude times its block's scale. In E4M3 a code plus 8
is twice the value. So from a scale's code ``c`` follow exactly the codes of 0.5, 1, 2 and 4 times
it. Those of 1.5, 3 and 6 times it follow from ``c'``, the code of 1.5 times the scale, rounded to
nearest, ties to even. For this all codes from ``c - 8`` to ``c' + 16`` must be normal and finite:
each expert's scales are shifted by the power of two that brings the largest as high as may be
(:data:`LARGEST`). A scale that is then below :data:`SMALLEST`, less than 2^-10 of the largest, is
raised by a power of two, and its block's codes are lowered by the same, rounded to nearest (ties to
even codes): an error of less than 2^-13 of the largest weight that the expert could have.

A stage is 64 rows by 128 columns: 4096 bytes of codes, then 512 bytes of scales.

Codes are 16 bytes for each of a warpgroup's 128 threads, in each of the stage's two chunks of 64
columns. Thread ``4 g + q`` of warp ``w`` has block ``q`` of the chunk, of the warp's rows ``g`` and
``g + 8``, each in two words of eight columns. The first four of a word's columns have their signs
in the highest bits of nibbles 1, 3, 5 and 7, the last four in those of nibbles 0, 2, 4 and 6. The
nibbles' other bits are, in order, the :data:`NUMBERS` of the columns' magnitudes.

Scales are 4 bytes for each thread: those of rows ``g`` and ``g + 8`` in each chunk. A scale's sign
bit says that ``c'`` is ``c + 5``, not ``c + 4``.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.functional import pad

from vllm_nvfp4_moe.kernels.hopper.bf16_weights import (
    BLOCK,
    GROUP_ROWS,
    STAGE,
    Rows,
    ordered,
    padded_columns,
    padded_rows,
)

STAGE_BYTES = GROUP_ROWS * STAGE // 2 + GROUP_ROWS * STAGE // BLOCK
"""Bytes of a stage."""

LARGEST = 105
"""The largest code of a scale: of 72, six times which rounds to 448, E4M3's largest."""
SMALLEST = 16
"""The smallest code of a scale: of 2^-5, half of which is E4M3's smallest normal number."""

EXPONENT = 9
"""Bias of the scales' exponent before the shift, so that none is subnormal; E4M3's is 7."""

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = (4, 0, 1, 5, 2, 6, 3, 7)
"""Where each magnitude is in a thread's table, which has first those that follow from ``c``."""


@functools.cache
def _lowered() -> torch.Tensor:
    """What a byte (two codes) becomes if their magnitudes are halved so many times: uint8
    ``[6, 256]``. Five times make every code zero."""

    def code(code: int, times: int) -> int:
        value = MAGNITUDES[code & 7] / 2**times
        return code & 8 | min(range(8), key=lambda to: (abs(MAGNITUDES[to] - value), to % 2))

    bytes_ = [
        [code(byte & 15, times) | code(byte >> 4, times) << 4 for byte in range(256)]
        for times in range(6)
    ]
    return torch.tensor(bytes_, dtype=torch.uint8, device="cpu")


@functools.cache
def _words() -> torch.Tensor:
    """What each of four bytes (two codes each) adds to its thread's word: int32 ``[4, 256]``."""

    def place(code: int, column: int) -> int:
        sign = 8 * (column % 4) + (7 if column < 4 else 3)
        return NUMBERS[code & 7] << 4 * column | code >> 3 << sign

    words = [
        [place(byte & 15, 2 * i) | place(byte >> 4, 2 * i + 1) for byte in range(256)]
        for i in range(4)
    ]
    return torch.tensor(words, device="cpu").to(torch.int32)


def pack(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack one expert's matrix.

    Args:
        codes: uint8 ``[rows, columns / 2]``, the lower four bits the even column's.
        scales: E4M3 ``[rows, columns / 16]``, none negative or NaN.

    Returns:
        uint8 ``[row tiles, stages, STAGE_BYTES]``, rows and columns that were added being zero, and
        float32 ``[]``: what the weights in it are to be multiplied by, a power of two.
    """
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    height, width = padded_rows(rows), padded_columns(columns)
    code, shift, raised, lit = _shifted(scales)
    # A block of scale zero has zeros, whatever its codes.
    codes = codes * lit.repeat_interleave(BLOCK // 2, 1)
    if bool((raised > 0).any()):
        times = raised.clamp(max=5).repeat_interleave(BLOCK // 2, 1)
        codes = _lowered().to(codes.device)[times, codes.int()]
    if (height, width) != (rows, columns):
        codes = pad(codes, (0, (width - columns) // 2, 0, height - rows))
        more = (0, (width - columns) // BLOCK, 0, height - rows)
        code = pad(code, more, value=SMALLEST)
    # [tile, warp, half of its 16, g, stage, chunk, q, MMA, of its four]
    byte = codes.view(height // GROUP_ROWS, 4, 2, 8, width // STAGE, 2, 4, 2, 4).int()
    words = _words().to(codes.device)
    word = words[0][byte[..., 0]]
    for i in range(1, 4):
        word |= words[i][byte[..., i]]
    # -> [tile, stage, chunk, warp, g, q, half, MMA]
    packed_codes = word.permute(0, 4, 5, 1, 3, 6, 2, 7).contiguous().view(torch.uint8)
    mantissa = code & 7
    code = code | ((mantissa >= 1) & (mantissa <= 5)).to(torch.uint8) << 7
    # [tile, warp, half, g, stage, chunk, q] -> [tile, stage, warp, g, q, chunk, half]
    scale = code.view(height // GROUP_ROWS, 4, 2, 8, width // STAGE, 2, 4)
    packed_scales = scale.permute(0, 4, 1, 3, 6, 5, 2).contiguous()
    tiles, stages = height // GROUP_ROWS, width // STAGE
    packed = [packed_codes.view(tiles, stages, -1), packed_scales.view(tiles, stages, -1)]
    return torch.cat(packed, 2), torch.exp2((EXPONENT - 7 + shift).float().neg())


def _shifted(
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shift an expert's scales.

    Returns:
        Their E4M3 codes afterwards, uint8, all from SMALLEST to LARGEST; the shift, int32 ``[]``,
        in powers of two over EXPONENT's bias; by how many powers of two each was raised beside,
        int32; which are not zero, bool.
    """
    mantissa, exponent = torch.frexp(scales.float())  # mantissa in [0.5, 1)
    code = ((exponent - 1 + EXPONENT) * 8 + (mantissa * 16 - 8)).int()
    lit = mantissa != 0
    largest = torch.where(lit, code, 0).amax()
    shift = (LARGEST - largest).div(8, rounding_mode="floor")
    code = torch.where(lit, code + 8 * shift, SMALLEST)
    raised = (SMALLEST + 7 - code).clamp(min=0) // 8
    return (code + 8 * raised).to(torch.uint8), shift, raised, lit


def pack_experts(
    codes: torch.Tensor, scales: torch.Tensor, rows: Rows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack all experts' matrices. Only one expert's is in memory twice at a time.

    Args:
        codes: uint8 ``[experts, rows, columns / 2]``.
        scales: E4M3 ``[experts, rows, columns / 16]``.
        rows: what these are.

    Returns:
        uint8 ``[experts, row tiles, stages, STAGE_BYTES]``, and float32 ``[experts]``: what each
        expert's weights in it are to be multiplied by.
    """
    tiles = padded_rows(codes.shape[1]) // GROUP_ROWS
    stages = padded_columns(2 * codes.shape[2]) // STAGE
    packed = codes.new_empty(codes.shape[0], tiles, stages, STAGE_BYTES)
    factors = torch.empty(codes.shape[0], dtype=torch.float32, device=codes.device)
    for expert in range(codes.shape[0]):
        packed[expert], factors[expert] = pack(*ordered(codes[expert], scales[expert], rows))
    return packed, factors
