"""One product of an expert: weights that share their inputs, rounded for what the inputs are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quantize.calibration.second_moments import SecondMoments
from quantize.nvfp4.format import NvFp4
from quantize.nvfp4.kernels.kernel import Kernel, Quantized, quantize_weights, shared_scale
from quantize.nvfp4.rounding.loss import loss
from quantize.nvfp4.rounding.method import Job, Rounded


@dataclass(frozen=True)
class Product:
    """Weights that share their inputs and a global scale: gate and up, or down.

    Attributes:
        weights: each ``[out, in]``.
        inputs: the second moments of their inputs.
        gradients: the second moments of the loss's gradients with respect to their outputs, one
            weight's outputs after another's; None if the rounding method does not need them.
    """

    weights: list[torch.Tensor]
    inputs: SecondMoments
    gradients: SecondMoments | None

    def job(self, kernel: Kernel) -> Job:
        """Return what a rounding method takes.

        Raises:
            NotFiniteError: if a weight is NaN or infinite.
        """
        scale = shared_scale(self.weights, kernel)
        # Their inputs and global scale are the same: one above the other, they are one weight.
        both = torch.cat([weight.float() for weight in self.weights])
        output_hessian = self.gradients.estimate() if self.gradients is not None else None
        return Job(both, self.inputs.estimate(), scale, output_hessian)

    def results(self, rounded: Rounded, kernel: Kernel) -> list[Quantized]:
        """Return what a rounding method made of :meth:`job`, weight by weight."""
        scale = shared_scale(self.weights, kernel)
        results = []
        sizes = [len(weight) for weight in self.weights]
        parts = zip(self.weights, *(whole.split(sizes) for whole in rounded), strict=True)
        for weight, own_codes, own_scales in parts:
            stored = NvFp4(own_codes, own_scales, scale)
            noise, signal = kernel.compare(weight, stored)
            bits = stored.block_scale.view(torch.uint8).flatten()
            counts = torch.bincount(bits.cpu(), minlength=127)
            results.append(Quantized(stored, noise, signal, counts))
        return results

    def errors(self, results: list[Quantized], rule: str, kernel: Kernel) -> tuple[float, float]:
        """Return the relative errors of the product's output over the calibration tokens.

        The first is that of the weights quantized by the scale rule ``rule``, and the second that
        of ``results``. If :attr:`gradients` are known, what counts is the errors' effect on the
        loss. Both are NaN if there were no tokens.
        """
        some = self.gradients is not None and self.gradients.tokens
        output_hessian = self.gradients.total if self.gradients is not None and some else None

        def size(differences: list[torch.Tensor]) -> float:
            whole = torch.cat([each.float() for each in differences])
            return loss(whole, self.inputs.total, output_hessian)

        whole = size(self.weights)
        if not whole > 0:
            return math.nan, math.nan
        before, after = (
            size(
                [
                    result.weight.dequantize() - weight.float()
                    for weight, result in zip(self.weights, each, strict=True)
                ]
            )
            for each in (quantize_weights(self.weights, rule, kernel), results)
        )
        return math.sqrt(max(0.0, before) / whole), math.sqrt(max(0.0, after) / whole)
