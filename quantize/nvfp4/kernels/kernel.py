"""What a kernel is, and quantizing weights that share a global scale with one."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from quantize.nvfp4.format import NvFp4
from quantize.nvfp4.scales import RULES
from quantize.nvfp4.scales.rule import ScaleRule


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

    def encode(
        self, weight: torch.Tensor, global_scale: torch.Tensor, rule: ScaleRule
    ) -> Quantized:
        """Quantize ``weight`` ``[out, in]``, of finite numbers, with a given global scale."""

    def compare(self, weight: torch.Tensor, stored: NvFp4) -> tuple[float, float]:
        """Noise and signal, as :class:`Quantized` has them, of a weight that is stored so."""


class NotFiniteError(ArithmeticError):
    """Some weights are NaN or infinite."""


def quantize_weights(weights: list[torch.Tensor], rule: str, kernel: Kernel) -> list[Quantized]:
    """Quantize ``weights`` (each ``[out, in]``, any float dtype) with one shared global scale.

    Args:
        rule: a key of ``quantize.nvfp4.scales.RULES``.

    Raises:
        NotFiniteError: if a weight is NaN or infinite.
    """
    shared = shared_scale(weights, kernel, rule)
    return [kernel.encode(weight, shared, RULES[rule]) for weight in weights]


def shared_scale(weights: list[torch.Tensor], kernel: Kernel, rule: str = "max") -> torch.Tensor:
    """The global scale, float32 scalar, of weights that share one; raises as the above."""
    amax = torch.stack([kernel.amax(weight) for weight in weights]).amax()
    if not torch.isfinite(amax):
        raise NotFiniteError
    return RULES[rule].global_scale(amax, weights)
