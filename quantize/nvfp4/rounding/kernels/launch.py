"""What is around the kernels: the device they start on, and matrix products in full float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Start kernels on ``device``, with :func:`full_float32`."""
    # Triton starts kernels on the current device. (On a CPU, its interpreter runs them.)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), full_float32():
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Let no matrix product of float32 use TF32.

    What is left to make up for is brought up to date by differences, thousands of times. TF32 has
    10 bits of mantissa: each product would leave a thousandth of a change as an error, and all
    that follows would make up for errors that are not there. PyTorch's default is full float32,
    but whoever calls may have changed it. The setting is the process's, not the thread's.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
