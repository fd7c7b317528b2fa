"""Quantizing experts as a pass through the model comes to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import TypeVar

import torch

from quantize.calibration.crew import Crew, Outcome, Work
from quantize.calibration.damaged import OF_TEXT, damaged
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.input_scales import input_scales
from quantize.calibration.product import Product
from quantize.calibration.room import side_by_side
from quantize.calibration.routing import Chunk, Routing
from quantize.calibration.second_moments import SecondMoments
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import ExpertGroup
from quantize.layouts.layout import Layout
from quantize.nvfp4.input_scales.magnitudes import Magnitudes
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import Kernel, NotFiniteError, Quantized, quantize_weights
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.method import Method
from quantize.run.options import MIN_TOKENS, Calibration
from quantize.run.staged import Findings, Staged
from quantize.run.weight_error import WeightError

T = TypeVar("T")

FALLBACK = "mse"
"""The scale rule for experts with fewer than ``MIN_TOKENS``."""


class Quantizer:
    """A visitor (``quantize.calibration.visitor``) that quantizes experts and stages the results.

    Args:
        groups: the experts to be quantized; it lets others pass.
        layout_of: the layout of each of them.
        rule: one of ``quantize.nvfp4.input_scales.INPUT_RULES``.
        rounder: rounds them, unless there is a crew.
        crew: rounds several batches at once.
    """

    def __init__(
        self,
        staged: Staged,
        groups: list[ExpertGroup],
        layout_of: Callable[[ExpertGroup], Layout],
        rule: Callable[[Magnitudes], float],
        rounder: Rounder,
        crew: Crew | None = None,
    ) -> None:
        self._rule = rule
        self._staged = staged
        self._groups = groups
        self._layout_of = layout_of
        self._rounder = rounder
        self._crew = crew

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Open the group's file."""
        self._group = group if group in self._groups else None
        if self._group is None:
            return
        self._outcomes: dict[int, Outcome] = {}
        self._routing = routing
        self._waiting: list[tuple[int, ExpertWeights]] = []
        self._together = 0
        self._writer = self._staged.writer(group)

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        """Quantize one expert, or let it wait for others that are to be rounded together with it;
        the model goes on with the original.

        Raises:
            DamagedWeightsError: if the weights or intermediate states of an expert that waited are
                NaN or infinite.
        """
        if self._group is None:
            return weights
        if not self._together:
            method = self._rounder.method
            if self._crew is not None:
                self._together = self._crew.together(self._group, method)
            else:
                self._together = side_by_side(self._group, method, [weights.down.device])
        self._waiting.append((number, weights))
        if len(self._waiting) == self._together:
            self._quantize_waiting(self._group)
        return weights

    @property
    def behind(self) -> int:
        """How many experts wait to be rounded together with others, or are being rounded."""
        if self._group is None:
            return 0
        return len(self._waiting) + (self._crew.at_work if self._crew is not None else 0)

    def end(self) -> None:
        """Quantize the experts that wait, write the input scales, and finish the group's file.

        An expert with few tokens has the whole layer's input scales, so they are written last.

        Raises:
            DamagedWeightsError: see :meth:`expert`.
        """
        group = self._group
        if group is None:
            return
        self._quantize_waiting(group, last=True)
        # By number, whichever came first.
        outcomes = [self._outcomes[number] for number in range(group.num_experts)]
        undersampled = {one.number for one in outcomes if one.rule == FALLBACK}
        scales = input_scales([one.magnitudes for one in outcomes], undersampled, self._rule)
        layout = self._layout_of(group)
        for expert, (gate_up, down) in enumerate(scales):
            modules = group.modules(expert)
            for module, scale in zip(modules, [gate_up] * (len(modules) - 1) + [down], strict=True):
                for suffix, tensor in layout.store_input_scale(scale).items():
                    self._writer.write(f"{module}.{suffix}", tensor)
        self._writer.finish()
        self._staged.finish(
            group,
            Findings(
                group.prefix,
                [one.tokens for one in outcomes],
                [one.rule for one in outcomes],
                [one.before for one in outcomes],
                [one.after for one in outcomes],
                [lost for one in outcomes for lost in one.lost],
            ),
        )

    def _quantize_waiting(self, group: ExpertGroup, last: bool = False) -> None:
        try:
            if self._waiting:
                work, self._waiting = Work(group, self._waiting, self._routing), []
                if self._crew is not None:
                    self._crew.give(work, self._take)
                else:
                    self._take(self._rounder.round(work))
            if last and self._crew is not None:
                self._crew.finish()
        except BaseException:
            if self._crew is not None:
                self._crew.stop()
            self._writer.abort()
            raise

    def _take(self, outcomes: list[Outcome]) -> None:
        """Write what became of some experts; members of the crew call this."""
        for one in outcomes:
            for name, data in one.tensors.items():
                self._writer.write(name, data)
            self._outcomes[one.number] = one._replace(tensors={})


class Rounder:
    """Rounds experts for what they are given.

    Args:
        rule: the scale rule whose errors the findings compare with.
    """

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, settings: Calibration, rule: str
    ) -> None:
        assert settings.method is not None
        self._method = settings.method
        self._checkpoint = checkpoint
        self._layout = layout
        self._settings = settings
        self._rule = rule

    @property
    def method(self) -> Method:
        """How."""
        return METHODS[self._method]

    def round(self, work: Work) -> list[Outcome]:
        """Round some experts, on the device that their weights are on.

        Raises:
            DamagedWeightsError: if an expert's weights or intermediate states are NaN or infinite.
        """
        group, experts, routing = work
        device = experts[0][1].down.device
        kernel = for_device(device)

        def tokens(number: int) -> Iterator[Chunk]:
            return routing.all() if self._settings.every_expert else routing.of(number)

        gate_ups, rules, gradients = {}, {}, {}
        for number, weights in experts:
            inputs, gate_up_gradients, gradients[number] = self._second_moments(
                group, weights, tokens(number)
            )
            undersampled = inputs.tokens < MIN_TOKENS
            rules[number] = FALLBACK if undersampled else self._method
            gate_ups[number] = Product(list(weights.gate_up), inputs, gate_up_gradients)
        gate_up_results = self._round(group, gate_ups, rules, kernel)
        # Down's inputs are what the quantized gate and up make.
        downs = {}
        for number, weights in experts:
            found = tuple(result.weight.dequantize() for result in gate_up_results[number])
            intermediate = SecondMoments(group.intermediate, device)
            for chunk in tokens(number):
                intermediate.add(weights.intermediate(chunk.x, found), chunk.weights)
            if not math.isfinite(intermediate.magnitudes.largest):
                raise damaged(self._checkpoint, group, number, OF_TEXT)
            downs[number] = Product([weights.down], intermediate, gradients[number])
        down_results = self._round(group, downs, rules, kernel)
        outcomes = []
        for number, _ in experts:
            gate_up, down = gate_ups[number], downs[number]
            pairs = [
                product.errors(results, self._rule, kernel)
                for product, results in (
                    (gate_up, gate_up_results[number]),
                    (down, down_results[number]),
                )
            ]
            results = chain(gate_up_results[number], down_results[number])
            lost, tensors = [], {}
            for module, result in zip(group.modules(number), results, strict=True):
                for suffix, tensor in self._layout.store(result.weight).items():
                    tensors[f"{module}.{suffix}"] = tensor.detach().cpu()
                error = WeightError(module, result.noise, result.signal, result.counts.tolist())
                lost.append(list(error))
            outcomes.append(
                Outcome(
                    number,
                    int(routing.counts[number]),
                    rules[number],
                    (gate_up.inputs.magnitudes, down.inputs.magnitudes),
                    [before for before, _ in pairs],
                    [after for _, after in pairs],
                    lost,
                    tensors,
                )
            )
        return outcomes

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
        self,
        group: ExpertGroup,
        products: dict[int, Product],
        rules: dict[int, str],
        kernel: Kernel,
    ) -> dict[int, list[Quantized]]:
        """Round one product of each of some experts, by their numbers."""
        method = METHODS[self._method]
        calibrated = [number for number in products if rules[number] != FALLBACK]

        def finite(number: int, make: Callable[[], T]) -> T:
            try:
                return make()
            except NotFiniteError:
                raise damaged(self._checkpoint, group, number) from None

        # One after another: each is dropped before the next one is made.
        jobs = (finite(number, partial(products[number].job, kernel)) for number in calibrated)
        if method.together is not None and len(calibrated) > 1:
            rounded = method.together(jobs, len(calibrated))
        else:
            rounded = [method.round(*job) for job in jobs]
        found = dict(zip(calibrated, rounded, strict=True))
        return {
            number: product.results(found.pop(number), kernel)
            if number in found
            else finite(number, partial(quantize_weights, product.weights, FALLBACK, kernel))
            for number, product in products.items()
        }
