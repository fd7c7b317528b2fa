"""Quantizing experts as the walk comes to them: the visitor that ``--calibrate`` sends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

import torch

from quantize.calibration.moments import Moments, input_scale
from quantize.calibration.routing import Chunk, Routing
from quantize.calibration.walk import Weights
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.layouts.layout import Layout, stored_tensors
from quantize.nvfp4 import format as nvfp4
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import (
    Kernel,
    NotFiniteError,
    Quantized,
    quantize_weights,
    shared_scale,
)
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.loss import loss
from quantize.run.options import FEW, Calibration
from quantize.run.shards import ShardWriter
from quantize.run.staged import Findings, Staged
from quantize.run.weight_error import WeightError

FALLBACK = "mse"


class Quantizer:
    """See ``quantize.calibration.walk.Visitor``.

    Args:
        groups: those to be quantized; others pass.
        plain: the scale rule to compare with.
    """

    def __init__(
        self,
        staged: Staged,
        groups: list[ExpertGroup],
        layout: Layout,
        settings: Calibration,
        plain: str,
    ) -> None:
        self._staged = staged
        self._groups = groups
        self._layout = layout
        self._settings = settings
        self._plain = plain

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Open the group's file."""
        self._group = group if group in self._groups else None
        if self._group is None:
            return
        self._findings = Findings(group.prefix)
        self._largest: list[tuple[float, float]] = []
        self._few: set[int] = set()
        self._writer = self._staged.writer(group, list(staged_outputs(group, self._layout)))

    def expert(self, number: int, weights: Weights, routing: Routing) -> Weights:
        """Quantize one expert, with what it is given; the model goes on with the original."""
        if self._group is None:
            return weights
        try:
            self._quantize(self._group, number, weights, routing)
        except BaseException:
            self._writer.abort()
            raise
        return weights

    def end(self) -> None:
        """Write the input scales, which may need the whole layer's, and finish the file."""
        group = self._group
        if group is None:
            return
        layer = [max(column) for column in zip(*self._largest, strict=True)]
        for expert, own in enumerate(self._largest):
            first, second = (input_scale(x) for x in (layer if expert in self._few else own))
            modules = group.modules(expert)
            for module, scale in zip(modules, [first] * (len(modules) - 1) + [second], strict=True):
                for suffix, tensor in self._layout.store_input_scale(scale).items():
                    self._write(self._writer, f"{module}.{suffix}", tensor)
        self._writer.finish()
        self._staged.finish(group, self._findings)

    def _quantize(
        self, group: ExpertGroup, number: int, weights: Weights, routing: Routing
    ) -> None:
        device = weights.down.device
        kernel = for_device(device)

        def tokens() -> Iterator[Chunk]:
            return routing.all() if self._settings.every_expert else routing.of(number)

        first, outputs = self._moments(group, weights, tokens())
        inputs = self._round(group, number, list(weights.inputs), first, outputs[0], kernel)
        # Down is given what the quantized gate and up make.
        found = tuple(q.weight.dequantize() for q in inputs)
        second = Moments(group.intermediate, device)
        for chunk in tokens():
            second.add(weights.between(chunk.x, found), chunk.weights)
        if not math.isfinite(second.largest):
            raise QuantizeError(
                f"{group.prefix}: expert {number} makes NaN or infinite numbers of the text; the "
                "source is damaged"
            )
        down = self._round(group, number, [weights.down], second, outputs[1], kernel)
        findings = self._findings
        findings.tokens.append(int(routing.counts[number]))
        findings.rules.append(self._rule(first))
        if first.tokens < FEW:
            self._few.add(number)
        self._largest.append((first.largest, second.largest))
        products = (
            (list(weights.inputs), inputs, first, outputs[0]),
            ([weights.down], down, second, outputs[1]),
        )
        pairs = [self._errors(*product, kernel) for product in products]
        findings.before.append([before for before, _ in pairs])
        findings.after.append([after for _, after in pairs])
        for module, result in zip(group.modules(number), chain(inputs, down), strict=True):
            for suffix, tensor in self._layout.store(result.weight).items():
                self._write(self._writer, f"{module}.{suffix}", tensor)
            lost = WeightError(module, result.noise, result.signal, result.counts.tolist())
            findings.lost.append(list(lost))

    def _moments(
        self, group: ExpertGroup, weights: Weights, tokens: Iterator[Chunk]
    ) -> tuple[Moments, tuple[Moments | None, Moments | None]]:
        """Of what gate and up are given; and, if the method takes them, of the loss's gradients by
        what gate and up make, one above the other, and by what down makes."""
        device = weights.down.device
        first = Moments(group.hidden, device)
        needed = METHODS[self._settings.method].needs_output
        before = Moments(sum(map(len, weights.inputs)), device) if needed else None
        after = Moments(group.hidden, device) if needed else None
        for chunk in tokens:
            first.add(chunk.x, chunk.weights)
            if before is not None and after is not None:
                assert chunk.gradient is not None
                by_output = chunk.gradient * chunk.weights.unsqueeze(1)
                after.add(by_output)
                before.add(torch.cat(weights.slopes(chunk.x, by_output), 1))
        return first, (before, after)

    def _rule(self, moments: Moments) -> str:
        return FALLBACK if moments.tokens < FEW else self._settings.method

    def _round(
        self,
        group: ExpertGroup,
        number: int,
        weights: list[torch.Tensor],
        moments: Moments,
        outputs: Moments | None,
        kernel: Kernel,
    ) -> list[Quantized]:
        """Weights that share inputs and a global scale."""
        rule = self._rule(moments)
        try:
            if rule == FALLBACK:
                return quantize_weights(weights, rule, kernel)
            scale = shared_scale(weights, kernel)
        except NotFiniteError:
            raise QuantizeError(
                f"{', '.join(group.weights_of(number))}: expert {number} of {group.prefix} holds "
                "NaN or infinite weights; the source is damaged"
            ) from None
        # Gate and up have the same inputs and global scale: one above the other, one weight.
        both = torch.cat([weight.float() for weight in weights])
        by_output = outputs.estimate() if outputs is not None else None
        codes, block_scale = METHODS[rule].round(both, moments.estimate(), scale, by_output)
        results = []
        sizes = [len(weight) for weight in weights]
        parts = zip(weights, codes.split(sizes), block_scale.split(sizes), strict=True)
        for weight, own_codes, own_scales in parts:
            stored = nvfp4.NvFp4(own_codes, own_scales, scale)
            noise, signal = kernel.compare(weight, stored)
            bits = stored.block_scale.view(torch.uint8).flatten()
            counts = torch.bincount(bits.cpu(), minlength=127)
            results.append(Quantized(stored, noise, signal, counts))
        return results

    def _errors(
        self,
        weights: list[torch.Tensor],
        results: list[Quantized],
        moments: Moments,
        outputs: Moments | None,
        kernel: Kernel,
    ) -> tuple[float, float]:
        """Relative errors of a product's output: quantized plainly, and as ``results`` are. With
        moments of its gradients, by what they do to the loss."""
        by_output = outputs.total if outputs is not None and outputs.tokens else None

        def size(some: list[torch.Tensor]) -> float:
            return loss(torch.cat([each.float() for each in some]), moments.total, by_output)

        whole = size(weights)
        if not whole > 0:
            return math.nan, math.nan
        before, after = (
            size([r.weight.dequantize() - w.float() for w, r in zip(weights, some, strict=True)])
            for some in (quantize_weights(weights, self._plain, kernel), results)
        )
        return math.sqrt(max(0.0, before) / whole), math.sqrt(max(0.0, after) / whole)

    def _write(self, writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        writer.write(name, tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu())


def staged_outputs(group: ExpertGroup, layout: Layout) -> Iterator[TensorInfo]:
    """The tensors of all experts of a group, without biases."""
    for expert in range(group.num_experts):
        for module, shape in zip(group.modules(expert), group.shapes, strict=True):
            yield from stored_tensors(module, shape, layout)
