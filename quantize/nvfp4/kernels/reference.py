"""The reference kernel: the format and the rules in plain PyTorch, for any device and any rule.

Every faster kernel must give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantize.nvfp4 import format as nvfp4
from quantize.nvfp4.kernels.kernel import Quantized
from quantize.nvfp4.scales.rule import ScaleRule


class ReferenceKernel:
    """See ``quantize.nvfp4.kernels.kernel.Kernel``.

    Args:
        rows: the number of rows of a weight that are quantized at a time. It keeps float32
            temporaries small compared to the weight. The result does not depend on it.
    """

    def __init__(self, rows: int = 4096) -> None:
        self._rows = rows

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs().amax().float()

    def encode(
        self, weight: torch.Tensor, global_scale: torch.Tensor, rule: ScaleRule
    ) -> Quantized:
        codes, scales = [], []
        noise = signal = 0.0
        for part in weight.split(self._rows):
            block_scale = rule.block_scale(part, global_scale)
            packed = nvfp4.encode(part, block_scale, global_scale)
            lost = nvfp4.dequantize(packed, block_scale, global_scale).double() - part.double()
            noise += float(lost.square().sum())
            signal += float(part.double().square().sum())
            codes.append(packed)
            scales.append(block_scale)
        block_scale = torch.cat(scales)
        counts = torch.bincount(block_scale.view(torch.uint8).flatten().cpu(), minlength=127)
        weight_ = nvfp4.NvFp4(torch.cat(codes), block_scale, global_scale)
        return Quantized(weight_, noise, signal, counts)

    def compare(self, weight: torch.Tensor, stored: nvfp4.NvFp4) -> tuple[float, float]:
        noise = signal = 0.0
        for part, codes, block_scale in self._parts(weight, stored):
            restored = nvfp4.dequantize(codes, block_scale, stored.global_scale)
            noise += float((restored.double() - part.double()).square().sum())
            signal += float(part.double().square().sum())
        return noise, signal

    def products(self, weight: torch.Tensor, stored: nvfp4.NvFp4) -> tuple[float, float]:
        kept = signal = 0.0
        for part, codes, block_scale in self._parts(weight, stored):
            whole = part.float() * stored.global_scale.reciprocal()
            units = nvfp4.dequantize(codes, block_scale, torch.ones_like(stored.global_scale))
            kept += float((whole * units * 128).round().double().sum())
            signal += float((whole * whole * 128).round().double().sum())
        return kept, signal

    def _parts(
        self, weight: torch.Tensor, stored: nvfp4.NvFp4
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Some rows at a time: of ``weight``, and their codes and block scales."""
        split = (each.split(self._rows) for each in (weight, stored.codes, stored.block_scale))
        yield from zip(*split, strict=True)
