"""E2M1 and E4M3 in Triton: what kernels for GPUs share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_e2m1(t):  # type: ignore[no-untyped-def]
    """The E2M1 magnitude nearest to ``t >= 0``, ties to even; ``numba_cpu`` explains how."""
    magic = tl.where(t < 2.0, 6291456.0, tl.where(t < 4.0, 12582912.0, 25165824.0))
    return tl.minimum((t + magic) - magic, 6.0)


@triton.jit
def e4m3_value(bits):  # type: ignore[no-untyped-def]
    """The float32 value of non-negative E4M3 bits (int32)."""
    normal = ((bits << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(bits < 8, bits.to(tl.float32) * 0.001953125, normal)


@triton.jit
def e4m3_bits(x):  # type: ignore[no-untyped-def]
    """Bits (int32) of the E4M3 value nearest to ``x``, which is in [2^-9, 448]; ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = ((x * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)
    return tl.where(x < 0.015625, subnormal, normal)
