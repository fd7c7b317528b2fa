"""The kernel for CPUs, in numba. It gives the same bits as the reference kernel.

A weight is treated as one sequence of blocks, without regard to its rows. Its chunks are small
enough to stay in the first-level cache. The loops have no branches, so LLVM turns them into vector
instructions. Fast-math is off: every operation rounds as it does in the reference. The kernel
releases Python's global interpreter lock, so threads can quantize different weights at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from quantize.nvfp4.format import BLOCK, NvFp4, decode
from quantize.nvfp4.kernels.compiled import compiled
from quantize.nvfp4.kernels.kernel import Quantized
from quantize.nvfp4.kernels.reference import ReferenceKernel
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST
from quantize.nvfp4.scales.rule import ScaleRule

_CHUNK = 256
"""Number of blocks in a chunk: 4096 weights, 16 KB as float32."""

_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}

_VALUES = torch.arange(127, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()
E4M3 = _VALUES.numpy()
"""float32 ``[127]``: the value of each E4M3 bit pattern that is neither negative nor NaN."""
_PAIRS = decode(torch.arange(256, dtype=torch.uint8, device="cpu").unsqueeze(1)).numpy()
"""float32 ``[256, 2]``: both E2M1 values of each packed byte."""
_RECIPROCALS = _VALUES.reciprocal().numpy()

_F, _I, _U = np.float32, np.int32, np.uint32
# Adding and then subtracting one of these numbers rounds to a multiple of 0.5, 1 or 2, ties to
# even. These are the spacings of E2M1 below 2, from 2 to 4, and above 4.
_HALVES, _ONES, _TWOS = _F(1.5 * 2**22), _F(1.5 * 2**23), _F(1.5 * 2**24)
_MAGNITUDE = _U(0x7FFFFFFF)
_MIN, _MAX, _NORMAL = _F(2.0**-9), _F(448), _F(2.0**-6)
"""E4M3's smallest, largest, and smallest normal values."""


exact = compiled(nogil=True, error_model="numpy")
"""A decorator for loops in which every operation rounds by itself."""


@njit(inline="always")
def round_e2m1(t: Any) -> Any:
    """The E2M1 magnitude nearest to ``t >= 0``, ties to even."""
    magic = _HALVES if t < _F(2) else (_ONES if t < _F(4) else _TWOS)
    return min((t + magic) - magic, _F(6))


@exact
def _largest(bits, mask):  # type: ignore[no-untyped-def]
    """Bits of the largest magnitude. Infinity and NaN are larger than all finite numbers."""
    best = bits[0] & mask
    for i in range(bits.shape[0]):
        best = max(best, bits[i] & mask)
    return best


@exact
def _widen(source, half, x):  # type: ignore[no-untyped-def]
    """Write ``source`` as float32 bits to ``x``: float32, float16 if ``half``, else bfloat16."""
    if source.itemsize == 4:
        for i in range(source.shape[0]):
            x[i] = source[i]
    elif half:
        floats = x.view(np.float32)
        for i in range(source.shape[0]):
            magnitude = _U(source[i] & np.uint16(0x7FFF))
            # Its denormals are none of float32's, and no operand here is one: a process may have
            # the processor take those for zero. 112 is the difference of the exponents' biases.
            floats[i] = _F(_I(magnitude)) * _F(2.0**-24)
            normal = (magnitude << _U(13)) + _U(112 << 23)
            x[i] = normal if magnitude >= _U(0x400) else x[i]
            x[i] |= _U(source[i] & np.uint16(0x8000)) << _U(16)
    else:
        for i in range(source.shape[0]):
            x[i] = _U(source[i]) << _U(16)


@exact
def _max_scales(x, bits, divisor, scale):  # type: ignore[no-untyped-def]
    """The ``max`` rule: set ``scale`` (E4M3 bits) for each block of float32 bits ``x``."""
    blocks = scale.shape[0]
    ratio = bits.view(np.float32)
    for b in range(blocks):
        largest = _U(0)
        for j in range(BLOCK):
            largest = max(largest, x[BLOCK * b + j] & _MAGNITUDE)
        bits[b] = largest
    for b in range(blocks):
        ratio[b] = min(max(ratio[b] / divisor, _MIN), _MAX)
    for b in range(blocks):
        # Round to three bits of mantissa, ties to even. The exponent's bias changes from 127 to 7.
        rounded = bits[b] + _U(0x7FFFF) + ((bits[b] >> _U(20)) & _U(1))
        normal = (rounded >> _U(20)) - _U(120 << 3)
        subnormal = _U((ratio[b] * _F(512) + _F(2.0**23)) - _F(2.0**23))
        scale[b] = np.uint8(subnormal if ratio[b] < _NORMAL else normal)


@exact
def _search_scales(x, global_scale, reach, e4m3, reciprocals, y, work, start, highest, scale):  # type: ignore[no-untyped-def]
    """The search of ``quantize.nvfp4.scales.mse``: replaces ``scale``, which ``max`` has set.

    ``y`` is ``[16, blocks]``, so that one vector register holds a value of many blocks.
    """
    blocks = scale.shape[0]
    best, error, value, inverse = work[0], work[1], work[2], work[3]
    for b in range(blocks):
        for k in range(BLOCK):
            y[k, b] = abs(x[BLOCK * b + k]) / global_scale
    below, above, least = reach
    last = 0
    for b in range(blocks):
        start[b] = scale[b]
        highest[b] = min(max(start[b] + above, least), HIGHEST)
        last = max(last, highest[b] - start[b])
        best[b] = np.inf
    for step in range(-below - 1, last + 1):
        offset = _I(0) if step < -below else _I(step)
        if step == 0:
            continue
        for b in range(blocks):
            candidate = max(min(start[b] + offset, highest[b]), LOWEST)
            value[b] = e4m3[candidate]
            inverse[b] = reciprocals[candidate]
            error[b] = _F(0)
        for k in range(BLOCK):
            for b in range(blocks):
                lost = y[k, b] - round_e2m1(y[k, b] * inverse[b]) * value[b]
                error[b] += lost * lost
        for b in range(blocks):
            better = error[b] < best[b]
            best[b] = error[b] if better else best[b]
            candidate = max(min(start[b] + offset, highest[b]), LOWEST)
            scale[b] = np.uint8(candidate) if better else scale[b]


@exact
def _codes(x, global_scale, scale, e4m3, codes, packed, noise, signal):  # type: ignore[no-untyped-def]
    """``quantize.nvfp4.format.encode``, with sums of squares.

    ``noise`` and ``signal`` ``[16]`` hold a sum for each position in a block, in units of the
    squared global scale.
    """
    bits = x.view(np.uint32)
    inverse = _F(1) / global_scale
    for b in range(scale.shape[0]):
        value = e4m3[scale[b]]
        step = value * global_scale
        for j in range(BLOCK):
            i = BLOCK * b + j
            magnitude = round_e2m1(abs(x[i]) / step)
            # For magnitudes from 1 on, the exponent and the first bit of the mantissa, read as one
            # integer, count the codes up from 2.
            above = _I(_F(magnitude).view(np.int32) >> _I(22)) - _I(252)
            code = _I(magnitude * _F(2)) if magnitude < _F(1) else above
            codes[i] = np.uint8(code | _I((bits[i] >> _U(31)) << _U(3)))
            whole = abs(x[i]) * inverse
            lost = whole - magnitude * value
            noise[j] += lost * lost
            signal[j] += whole * whole
    pairs = codes.view(np.uint16)
    for i in range(packed.shape[0]):
        packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


@exact
def _encode(source, half, global_scale, reach, e4m3, reciprocals, packed, scale, counts):  # type: ignore[no-untyped-def]
    """Quantize a whole weight; returns noise and signal in units of the squared global scale."""
    bits = np.empty(BLOCK * _CHUNK, np.uint32)
    x = bits.view(np.float32)
    codes = np.empty(BLOCK * _CHUNK, np.uint8)
    largest = np.empty(_CHUNK, np.uint32)
    y = np.empty((BLOCK, _CHUNK), np.float32)
    work = np.empty((4, _CHUNK), np.float32)
    start = np.empty((2, _CHUNK), np.int32)
    sums = np.zeros((2, BLOCK), np.float32)
    noise = signal = 0.0
    divisor = _F(6) * global_scale
    for first in range(0, scale.shape[0], _CHUNK):
        last = min(first + _CHUNK, scale.shape[0])
        part = scale[first:last]
        _widen(source[BLOCK * first : BLOCK * last], half, bits)
        _max_scales(bits, largest, divisor, part)
        if reach != (0, 0, 0):
            _search_scales(
                x, global_scale, reach, e4m3, reciprocals, y, work, start[0], start[1], part
            )
        out = packed[BLOCK // 2 * first : BLOCK // 2 * last]
        _codes(x, global_scale, part, e4m3, codes, out, sums[0], sums[1])
        for j in range(BLOCK):
            noise += sums[0, j]
            signal += sums[1, j]
        sums[:] = 0
        for b in range(part.shape[0]):
            counts[part[b]] += 1
    return noise, signal


@exact
def _compare(source, half, global_scale, pairs, e4m3, packed, scale):  # type: ignore[no-untyped-def]
    """Noise and signal of a stored weight, in units of the squared global scale."""
    bits = np.empty(BLOCK * _CHUNK, np.uint32)
    x = bits.view(np.float32)
    sums = np.zeros((2, BLOCK), np.float32)
    noise = signal = 0.0
    inverse = _F(1) / global_scale
    for first in range(0, scale.shape[0], _CHUNK):
        last = min(first + _CHUNK, scale.shape[0])
        _widen(source[BLOCK * first : BLOCK * last], half, bits)
        for b in range(first, last):
            value = e4m3[scale[b]]
            for j in range(BLOCK // 2):
                byte = packed[BLOCK // 2 * b + j]
                for k in range(2):
                    whole = x[BLOCK * (b - first) + 2 * j + k] * inverse
                    lost = pairs[byte, k] * value - whole
                    sums[0, 2 * j + k] += lost * lost
                    sums[1, 2 * j + k] += whole * whole
        for j in range(BLOCK):
            noise += sums[0, j]
            signal += sums[1, j]
        sums[:] = 0
    return noise, signal


@exact
def _products(source, half, global_scale, pairs, e4m3, packed, scale):  # type: ignore[no-untyped-def]
    """See ``quantize.nvfp4.kernels.kernel.Kernel.products``."""
    bits = np.empty(BLOCK * _CHUNK, np.uint32)
    x = bits.view(np.float32)
    sums = np.zeros((2, BLOCK), np.float64)
    inverse = _F(1) / global_scale
    for first in range(0, scale.shape[0], _CHUNK):
        last = min(first + _CHUNK, scale.shape[0])
        _widen(source[BLOCK * first : BLOCK * last], half, bits)
        for b in range(first, last):
            value = e4m3[scale[b]]
            for j in range(BLOCK // 2):
                byte = packed[BLOCK // 2 * b + j]
                for k in range(2):
                    whole = x[BLOCK * (b - first) + 2 * j + k] * inverse
                    kept = whole * (pairs[byte, k] * value)
                    sums[0, 2 * j + k] += np.rint(kept * _F(128))
                    sums[1, 2 * j + k] += np.rint(whole * whole * _F(128))
    return sums[0].sum(), sums[1].sum()


class NumbaKernel(ReferenceKernel):
    """See ``quantize.nvfp4.kernels.kernel.Kernel``.

    It leaves other dtypes than bfloat16, float16 and float32, rules without ``reach``, and rows
    that are no whole number of blocks, to the reference kernel.
    """

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype not in _BITS or not weight.numel():
            return super().amax(weight)
        bits = _flat_bits(weight)
        largest = int(_largest(bits, bits.dtype.type(2 ** (8 * bits.itemsize - 1) - 1)))
        if largest >= _INFINITY[weight.dtype]:
            return torch.tensor(torch.inf)
        return torch.tensor(largest).to(_BITS[weight.dtype]).view(weight.dtype).float()

    def encode(
        self, weight: torch.Tensor, global_scale: torch.Tensor, rule: ScaleRule
    ) -> Quantized:
        if weight.dtype not in _BITS or rule.reach is None or weight.shape[-1] % BLOCK:
            return super().encode(weight, global_scale, rule)
        rows, columns = weight.shape
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        block_scale = torch.empty(rows, columns // BLOCK, dtype=torch.uint8)
        counts = torch.zeros(127, dtype=torch.int64)
        scale = float(global_scale)
        noise, signal = _encode(
            _flat_bits(weight),
            weight.dtype == torch.float16,
            np.float32(scale),
            tuple(map(np.int32, rule.reach)),
            E4M3,
            _RECIPROCALS,
            codes.view(-1).numpy(),
            block_scale.view(-1).numpy(),
            counts.numpy(),
        )
        return Quantized(
            NvFp4(codes, block_scale.view(torch.float8_e4m3fn), global_scale),
            noise * scale * scale,
            signal * scale * scale,
            counts,
        )

    def compare(self, weight: torch.Tensor, stored: NvFp4) -> tuple[float, float]:
        if weight.dtype not in _BITS:
            return super().compare(weight, stored)
        scale = float(stored.global_scale)
        noise, signal = _compare(
            _flat_bits(weight),
            weight.dtype == torch.float16,
            np.float32(scale),
            _PAIRS,
            E4M3,
            stored.codes.contiguous().view(-1).numpy(),
            stored.block_scale.contiguous().view(-1).view(torch.uint8).numpy(),
        )
        return noise * scale * scale, signal * scale * scale

    def products(self, weight: torch.Tensor, stored: NvFp4) -> tuple[float, float]:
        if weight.dtype not in _BITS:
            return super().products(weight, stored)
        kept, signal = _products(
            _flat_bits(weight),
            weight.dtype == torch.float16,
            np.float32(float(stored.global_scale)),
            _PAIRS,
            E4M3,
            stored.codes.contiguous().view(-1).numpy(),
            stored.block_scale.contiguous().view(-1).view(torch.uint8).numpy(),
        )
        return float(kept), float(signal)


def _flat_bits(weight: torch.Tensor) -> Any:
    return weight.contiguous().view(-1).view(_BITS[weight.dtype]).numpy()
