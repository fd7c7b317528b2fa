"""The judge: ``quantize.nvfp4`` and ``quantize.scales`` as they are; any device, any rule."""

from __future__ import annotations

import torch

from quantize import nvfp4
from quantize.kernels import Quantized
from quantize.scales import RULES

_ROWS = 4096
"""Rows in work at a time, so that float32 temporaries stay small beside the weight."""


class ReferenceKernel:
    """See ``quantize.kernels.Kernel``."""

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.abs().amax().float()

    def encode(self, weight: torch.Tensor, global_scale: torch.Tensor, rule: str) -> Quantized:
        choose = RULES[rule]
        codes, scales = [], []
        noise = signal = 0.0
        for part in weight.split(_ROWS):
            block_scale = choose(part, global_scale)
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
        parts = zip(
            weight.split(_ROWS),
            stored.codes.split(_ROWS),
            stored.block_scale.split(_ROWS),
            strict=True,
        )
        for part, codes, block_scale in parts:
            restored = nvfp4.dequantize(codes, block_scale, stored.global_scale)
            noise += float((restored.double() - part.double()).square().sum())
            signal += float(part.double().square().sum())
        return noise, signal
