"""Quantizing experts as a pass through the model comes to them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

import torch

from quantize.calibration.damaged import OF_TEXT, damaged
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.input_scales import input_scales
from quantize.calibration.product import Product
from quantize.calibration.routing import Chunk, Routing
from quantize.calibration.second_moments import SecondMoments
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import ExpertGroup
from quantize.layouts.layout import Layout
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import Kernel, NotFiniteError, Quantized, quantize_weights
from quantize.nvfp4.rounding import METHODS
from quantize.run.options import MIN_TOKENS, Calibration
from quantize.run.staged import Findings, Staged
from quantize.run.weight_error import WeightError

FALLBACK = "mse"
"""The scale rule for experts with fewer than ``MIN_TOKENS``."""


class Quantizer:
    """A visitor (``quantize.calibration.visitor``) that quantizes experts and stages the results.

    Args:
        groups: the experts to be quantized; it lets others pass.
        rule: the scale rule whose errors the findings compare with.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        staged: Staged,
        groups: list[ExpertGroup],
        layout: Layout,
        settings: Calibration,
        rule: str,
    ) -> None:
        assert settings.method is not None
        self._method = settings.method
        self._checkpoint = checkpoint
        self._staged = staged
        self._groups = groups
        self._layout = layout
        self._settings = settings
        self._rule = rule

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Open the group's file."""
        self._group = group if group in self._groups else None
        if self._group is None:
            return
        self._findings = Findings(group.prefix)
        self._largest: list[tuple[float, float]] = []
        self._undersampled: set[int] = set()
        self._writer = self._staged.writer(group)

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        """Quantize one expert; the model goes on with the original.

        Raises:
            DamagedWeightsError: if its weights or intermediate states are NaN or infinite.
        """
        if self._group is None:
            return weights
        try:
            self._quantize(self._group, number, weights, routing)
        except BaseException:
            self._writer.abort()
            raise
        return weights

    def end(self) -> None:
        """Write the input scales, and finish the group's file.

        An expert with few tokens has the whole layer's input scales, so they are written last.
        """
        group = self._group
        if group is None:
            return
        scales = input_scales(self._largest, self._undersampled)
        for expert, (gate_up, down) in enumerate(scales):
            modules = group.modules(expert)
            for module, scale in zip(modules, [gate_up] * (len(modules) - 1) + [down], strict=True):
                self._write(module, self._layout.store_input_scale(scale))
        self._writer.finish()
        self._staged.finish(group, self._findings)

    def _quantize(
        self, group: ExpertGroup, number: int, weights: ExpertWeights, routing: Routing
    ) -> None:
        device = weights.down.device
        kernel = for_device(device)

        def tokens() -> Iterator[Chunk]:
            return routing.all() if self._settings.every_expert else routing.of(number)

        inputs, gate_up_gradients, down_gradients = self._second_moments(group, weights, tokens())
        undersampled = inputs.tokens < MIN_TOKENS
        rule = FALLBACK if undersampled else self._method
        gate_up = Product(list(weights.gate_up), inputs, gate_up_gradients)
        gate_up_results = self._round(group, number, gate_up, rule, kernel)
        # Down's inputs are what the quantized gate and up make.
        found = tuple(result.weight.dequantize() for result in gate_up_results)
        intermediate = SecondMoments(group.intermediate, device)
        for chunk in tokens():
            intermediate.add(weights.intermediate(chunk.x, found), chunk.weights)
        if not math.isfinite(intermediate.largest):
            raise damaged(self._checkpoint, group, number, OF_TEXT)
        down = Product([weights.down], intermediate, down_gradients)
        down_results = self._round(group, number, down, rule, kernel)
        if undersampled:
            self._undersampled.add(number)
        self._largest.append((inputs.largest, intermediate.largest))
        findings = self._findings
        findings.tokens.append(int(routing.counts[number]))
        findings.rules.append(rule)
        pairs = [
            product.errors(results, self._rule, kernel)
            for product, results in ((gate_up, gate_up_results), (down, down_results))
        ]
        findings.before.append([before for before, _ in pairs])
        findings.after.append([after for _, after in pairs])
        results = chain(gate_up_results, down_results)
        for module, result in zip(group.modules(number), results, strict=True):
            self._write(module, self._layout.store(result.weight))
            lost = WeightError(module, result.noise, result.signal, result.counts.tolist())
            findings.lost.append(list(lost))

    def _second_moments(
        self, group: ExpertGroup, weights: ExpertWeights, tokens: Iterator[Chunk]
    ) -> tuple[SecondMoments, SecondMoments | None, SecondMoments | None]:
        """Collect the second moments of what is known before anything is rounded.

        Returns:
            those of the inputs of gate and up; and, if the rounding method needs them, of the
            loss's gradients with respect to the outputs of gate and up together, and of down.
        """
        device = weights.down.device
        inputs = SecondMoments(group.hidden, device)
        if not METHODS[self._method].needs_output_hessian:
            for chunk in tokens:
                inputs.add(chunk.x, chunk.weights)
            return inputs, None, None
        gate_up = SecondMoments(sum(map(len, weights.gate_up)), device)
        down = SecondMoments(group.hidden, device)
        for chunk in tokens:
            inputs.add(chunk.x, chunk.weights)
            assert chunk.gradient is not None
            gradient = chunk.gradient * chunk.weights.unsqueeze(1)
            gradient = weights.product_gradient(chunk.x, gradient)
            down.add(gradient)
            gate_up.add(torch.cat(weights.gate_up_gradients(chunk.x, gradient), 1))
        return inputs, gate_up, down

    def _round(
        self, group: ExpertGroup, number: int, product: Product, rule: str, kernel: Kernel
    ) -> list[Quantized]:
        try:
            if rule == FALLBACK:
                return quantize_weights(product.weights, rule, kernel)
            return product.rounded(rule, kernel)
        except NotFiniteError:
            raise damaged(self._checkpoint, group, number) from None

    def _write(self, module: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write some of a module's tensors, by suffix."""
        for suffix, tensor in tensors.items():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            self._writer.write(f"{module}.{suffix}", data)
