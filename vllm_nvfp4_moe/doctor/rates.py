"""How fast this device reads its memory and multiplies: what the floors are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_SIDE = {"cuda": 8192, "cpu": 2048}
"""Of the matrices that are multiplied, by device."""
_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}
"""That are read: more than any cache holds."""
_ROUNDS = 5


def measure(device: torch.device, free: int) -> dict[str, float]:
    """``read_tb_s``, TB/s, by a sum over float32; ``tflops``, TFLOP/s, of a product of square
    matrices in bfloat16, or in float32 if that is faster. The best of a few rounds each.

    Args:
        free: bytes of the device's memory that nobody uses.
    """
    size = min(_BYTES[device.type], free // 4)
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    read = size / _seconds(device, data.sum) / 1e12
    del data
    side = _SIDE[device.type]
    best = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        one = torch.randn(side, side, device=device).to(dtype)
        seconds = _seconds(device, lambda one=one: one @ one)  # type: ignore[misc]
        best = max(best, 2 * side**3 / seconds / 1e12)
    return {"read_tb_s": read, "tflops": best}


def _seconds(device: torch.device, call: Callable[[], Any]) -> float:
    """The least that a call took."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    once()
    return min(once() for _ in range(_ROUNDS))
