"""The interface of a kernel, and quantizing weights that share a global scale with a kernel."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX, NvFp4
from quantize.nvfp4.scales import RULES
from quantize.nvfp4.scales.rule import ScaleRule


class Quantized(NamedTuple):
    """One quantized weight, and its quantization error.

    Attributes:
        weight: the quantized weight.
        noise: ``sum((dequantized - weight) ** 2)``.
        signal: ``sum(weight ** 2)``.
        counts: int64 ``[127]`` on the CPU: for each E4M3 bit pattern, the number of blocks with
            that block scale.
    """

    weight: NvFp4
    noise: float
    signal: float
    counts: torch.Tensor


class Kernel(Protocol):
    """An implementation of quantization for one kind of device."""

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        """The largest magnitude, float32 scalar; NaN or infinite if any weight is not finite."""

    def encode(
        self, weight: torch.Tensor, global_scale: torch.Tensor, rule: ScaleRule
    ) -> Quantized:
        """Quantize ``weight`` ``[out, in]``, all of it finite, with a given global scale."""

    def compare(self, weight: torch.Tensor, stored: NvFp4) -> tuple[float, float]:
        """Noise and signal, as in :class:`Quantized`, of a stored weight.

        Args:
            weight: the original weight ``[out, in]``.
            stored: the quantized weight.
        """

    def products(self, weight: torch.Tensor, stored: NvFp4) -> tuple[float, float]:
        """``sum(dequantized * weight)`` and ``sum(weight ** 2)``, in units of 2^-7 squared global
        scales, with each product rounded to a whole number of them.

        So sums are exact, whatever the order in which kernels add up: both decide bits.

        Args:
            weight: the original weight ``[out, in]``.
            stored: what :meth:`encode` made of it.
        """


class NotFiniteError(ArithmeticError):
    """Some weights are NaN or infinite."""


def quantize_weights(weights: list[torch.Tensor], rule: str, kernel: Kernel) -> list[Quantized]:
    """Quantize ``weights`` (each ``[out, in]``, any float dtype) with one shared global scale.

    Args:
        rule: the rule that chooses the scales, a key of ``quantize.nvfp4.scales.RULES``.
        kernel: the kernel to use; it must be for the device of the weights.

    Raises:
        NotFiniteError: if a weight is NaN or infinite.
    """
    shared = shared_scale(weights, kernel, rule)
    results = [kernel.encode(weight, shared, RULES[rule]) for weight in weights]
    return _unbiased(weights, results, kernel) if RULES[rule].unbiased else results


def _unbiased(
    weights: list[torch.Tensor], results: list[Quantized], kernel: Kernel
) -> list[Quantized]:
    """Multiply the global scale as ``quantize.nvfp4.scales.unbiased`` says."""
    both = [kernel.products(w, r.weight) for w, r in zip(weights, results, strict=True)]
    kept, signal = (sum(sums) for sums in zip(*both, strict=True))
    if not kept:  # all weights are zero
        return results
    before = results[0].weight.global_scale
    most = torch.finfo(torch.float32).max / (E2M1_MAX * E4M3_MAX)  # what they multiply is finite
    scale = (before.double() * (signal / kept)).float().clamp_max(most)
    factor, unit = float(scale) / float(before), float(before) ** 2 / 128
    scaled = []
    for result, (own_kept, own_signal) in zip(results, both, strict=True):
        # Of the weight W and the result Q: (W - f Q)^2, from W Q, W W and (W - Q)^2.
        square = result.noise + unit * (2 * own_kept - own_signal)
        noise = result.noise + 2 * (1 - factor) * unit * own_kept + (factor**2 - 1) * square
        stored = result.weight._replace(global_scale=scale)
        scaled.append(result._replace(weight=stored, noise=noise))
    return scaled


def shared_scale(weights: list[torch.Tensor], kernel: Kernel, rule: str = "max") -> torch.Tensor:
    """The global scale (float32 scalar) that ``weights`` share.

    Raises:
        NotFiniteError: if a weight is NaN or infinite.
    """
    amax = torch.stack([kernel.amax(weight) for weight in weights]).amax()
    if not torch.isfinite(amax):
        raise NotFiniteError
    return RULES[rule].global_scale(amax, weights)
