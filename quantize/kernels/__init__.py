"""Kernels that quantize: the reference arithmetic of ``quantize.nvfp4`` at the hardware's speed.

A new kernel is one file here, with a class like :class:`Kernel`, and a line in :func:`for_device`.
Whatever the kernel, the result is the reference's bit for bit (``tests/quantize/test_kernels.py``).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from quantize import nvfp4
from quantize.nvfp4 import NvFp4


class Quantized(NamedTuple):
    """One quantized weight, and how much it lost.

    Attributes:
        noise: ``sum((dequantized - weight) ** 2)``.
        signal: ``sum(weight ** 2)``.
        counts: int64 ``[127]`` on the CPU: how many blocks have the scale of each E4M3 bit pattern.
    """

    weight: NvFp4
    noise: float
    signal: float
    counts: torch.Tensor


class Kernel(Protocol):
    """One way to do the arithmetic, on one device."""

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        """Largest magnitude, float32 scalar; NaN or infinite if any weight is."""

    def encode(self, weight: torch.Tensor, global_scale: torch.Tensor, rule: str) -> Quantized:
        """Quantize ``weight`` ``[out, in]``, of finite numbers, with a given global scale.

        Args:
            rule: a key of ``quantize.scales.RULES``.
        """

    def compare(self, weight: torch.Tensor, stored: NvFp4) -> tuple[float, float]:
        """Noise and signal, as :class:`Quantized` has them, of a weight that is stored so."""


class NotFiniteError(ArithmeticError):
    """Some weights are NaN or infinite."""


def quantize_weights(weights: list[torch.Tensor], rule: str, kernel: Kernel) -> list[Quantized]:
    """Quantize ``weights`` (each ``[out, in]``, any float dtype) with one shared global scale.

    Raises:
        NotFiniteError: if a weight is NaN or infinite.
    """
    shared = shared_scale(weights, kernel)
    return [kernel.encode(weight, shared, rule) for weight in weights]


def shared_scale(weights: list[torch.Tensor], kernel: Kernel) -> torch.Tensor:
    """The global scale, float32 scalar, of weights that share one; raises as the above."""
    shared = nvfp4.global_scale_of(torch.stack([kernel.amax(w) for w in weights]).amax())
    if not torch.isfinite(shared):
        raise NotFiniteError
    return shared


def for_device(device: torch.device) -> Kernel:
    """The fastest kernel for weights that are on ``device``."""
    if device.type == "cuda":
        from quantize.kernels.triton_gpu import TritonKernel

        return TritonKernel()
    from quantize.kernels.numba_cpu import NumbaKernel

    return NumbaKernel()
