"""The quantized weights of the target: are they what they must be?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.layouts.layout import INPUT_SCALE, Layout, stored_tensors
from quantize.nvfp4.format import IMPLAUSIBLE, NvFp4
from quantize.nvfp4.kernels.kernel import NotFiniteError, quantize_weights, shared_scale
from quantize.run.convert import Stored, nothing_lost, stored_tensors_of
from quantize.run.worker import Worker
from quantize.verify.blocks import ROWS, Blocks, Bounds, compare_blocks
from quantize.verify.results import Lost
from quantize.verify.stored import Part, StoredWeight, not_finite, source_place

_LEAST, _LARGEST = 1e-12, 1e6
"""Of plausible input scales. They stand for largest inputs of 3e-9 and 3e9."""


@dataclass(frozen=True)
class Weights:
    """Weights that share a global scale: gate and up, down, or dense linears that engines fuse.

    Attributes:
        prefix: what they are counted under: the layer's experts, or the dense linears.
        modules: their module paths.
        shapes: ``[out, in]`` of each.
        rule: the scale rule that alone decides their bits; None if they can only be bounded.
        global_rule: the scale rule that decides their global scale, if it is known.
        text: input scales are those of a text.
        bounds: what rounding may lose, where there is no ``rule``.
        load: reads the source's weights, each ``[out, in]``; None if there is no source.
        names: of the source's tensors that it reads.
        carried: reads what they are in the source, if that is NVFP4: they must be the same.
        stays_float: their activations do, so they have no input scales.
        foreign: another tool may have made them, which decided on their scales.
        nbytes: of the source.
        memory: how many bytes checking them takes, about.
    """

    prefix: str
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    rule: str | None = None
    global_rule: str | None = None
    text: bool = True
    bounds: Bounds = ROWS
    load: Callable[[Worker], list[torch.Tensor]] | None = None
    nbytes: int = 0
    memory: int = 0
    carried: Callable[[Worker], list[Stored]] | None = None
    foreign: bool = False
    names: tuple[str, ...] = ()
    stays_float: bool = False

    def layout(self, layout: Layout) -> Layout:
        """Theirs, in a checkpoint in ``layout``."""
        return layout.weights_only if self.stays_float else layout

    def outputs(self, layout: Layout) -> list[tuple[TensorInfo, ...]]:
        """The tensors that must store each of them."""
        pairs = zip(self.modules, self.shapes, strict=True)
        own = self.layout(layout)
        return [stored_tensors(module, shape, own) for module, shape in pairs]

    def check(self, target: Checkpoint, layout: Layout, worker: Worker) -> tuple[Part, int]:
        """Check their tensors; return what was found and ``nbytes``."""
        part, layout = Part(self.prefix), self.layout(layout)
        found = [
            StoredWeight.read(target, layout, outputs, worker, part.problems)
            for outputs in self.outputs(layout)
        ]
        if self.carried is not None:
            self._check_carried(self.carried(worker), found, worker, part)
            return part, self.nbytes
        part.problems += self._input_scale_problems(layout, found)
        if self.load is None:
            part.problems += self._shared_problems(layout, found)
            return part, self.nbytes
        weights = self.load(worker)
        try:
            if self.rule is not None:
                self._check_bits(self.rule, weights, found, worker, part)
            else:
                self._check_bounds(weights, found, layout, worker, part)
        except NotFiniteError:
            part.problems.append(not_finite(worker.checkpoint, self.names, self.modules))
            unknown = torch.zeros(127, dtype=torch.int64)
            part.lost += [Lost(module, math.nan, math.nan, unknown) for module in self.modules]
        return part, self.nbytes

    def blocks(
        self, target: Checkpoint, layout: Layout, worker: Worker, module: str
    ) -> Blocks | None:
        """What each block of one of the weights lost; None if it cannot be read."""
        number, layout = self.modules.index(module), self.layout(layout)
        found = StoredWeight.read(target, layout, self.outputs(layout)[number], worker, [])
        if found is None or self.load is None:
            return None
        return compare_blocks(self.load(worker)[number], found.weight)

    def _check_carried(
        self,
        weights: list[Stored],
        stored: list[StoredWeight | None],
        worker: Worker,
        part: Part,
    ) -> None:
        """Compare with the source's own NVFP4 weights, bit by bit."""
        for weight, found in zip(weights, stored, strict=True):
            if found is None:
                continue
            try:
                wanted = stored_tensors_of(weight, found.layout)
            except ArithmeticError as error:
                where = source_place(worker.checkpoint, self.names)
                part.problems.append(f"{where}: {found.module}: {error}; get the source again")
                continue
            wrong = [p for end, tensor in wanted.items() for p in found.differences(end, tensor)]
            part.problems += wrong
            lost = nothing_lost(found.module, weight[0])
            noise = math.nan if wrong else lost.noise
            part.lost.append(found.lost(noise, lost.signal, torch.tensor(lost.counts)))

    def _check_bits(
        self,
        rule: str,
        weights: list[torch.Tensor],
        stored: list[StoredWeight | None],
        worker: Worker,
        part: Part,
    ) -> None:
        """Quantize again, and compare bit by bit."""
        results = quantize_weights(weights, rule, worker.kernel)
        for weight, result, found in zip(weights, results, stored, strict=True):
            if found is None:
                continue
            wanted = found.layout.store(result.weight)
            wrong = [p for end, t in wanted.items() for p in found.differences(end, t, rule)]
            part.problems += wrong
            noise, signal = result.noise, result.signal
            if wrong:
                noise, signal = worker.kernel.compare(weight, found.weight)
            part.lost.append(found.lost(noise, signal, result.counts))

    def _check_bounds(
        self,
        weights: list[torch.Tensor],
        stored: list[StoredWeight | None],
        layout: Layout,
        worker: Worker,
        part: Part,
    ) -> None:
        """Compare with what roundings can lose, see ``quantize.verify.blocks``."""
        scale = shared_scale(weights, worker.kernel, self.global_rule or "max")
        if self.global_rule is None:
            part.problems += self._shared_problems(layout, stored)
        for weight, found in zip(weights, stored, strict=True):
            if found is None:
                continue
            whole = found.weight
            if self.global_rule is not None:
                wanted = layout.store(NvFp4(whole.codes, whole.block_scale, scale))
                for end in layout.suffixes[2:3]:
                    part.problems += found.differences(end, wanted[end], self.global_rule)
            noise, signal = worker.kernel.compare(weight, whole)
            bits = whole.block_scale.contiguous().view(torch.uint8).flatten()
            part.lost.append(found.lost(noise, signal, torch.bincount(bits, minlength=127)))
            problem = compare_blocks(weight, whole).problem(self.bounds)
            if not problem and not noise <= IMPLAUSIBLE**2 * signal:
                problem = "these are not the source's weights"
            if problem:
                part.problems.append(
                    f"{found.where(layout.suffixes[0])}: relative error "
                    f"{part.lost[-1].relative:.3g}; {problem}; quantize again"
                )

    def _input_scale_problems(
        self, layout: Layout, stored: list[StoredWeight | None]
    ) -> Iterator[str]:
        """Input scales are plausible, those of weights with the same inputs are equal, and without
        a text they are 1.0."""
        there = [found for found in stored if found is not None]
        for end in list(layout.store_input_scale(INPUT_SCALE))[:1]:
            for found in there:
                value = found.input_scale
                if not self.text and value != INPUT_SCALE:
                    yield (
                        f"{found.where(end)} stands for an input scale of {value:.6g}, but without "
                        f"a text all are {INPUT_SCALE}; quantize again"
                    )
                elif not _LEAST <= value <= _LARGEST:
                    yield (
                        f"{found.where(end)} stands for an input scale of {value:.6g}, for which "
                        "no model has inputs; quantize again"
                    )
            alike = sorted({found.input_scale for found in there})
            plausible = all(_LEAST <= value <= _LARGEST for value in alike)
            if len(alike) > 1 and self.text and plausible and not self.foreign:
                yield (
                    f"{' and '.join(found.where(end) for found in there)} are of the same inputs, "
                    f"but stand for input scales of {' and '.join(f'{x:.6g}' for x in alike)}; "
                    "quantize again"
                )

    def _shared_problems(self, layout: Layout, stored: list[StoredWeight | None]) -> Iterator[str]:
        """Weights that engines fuse have one global scale, if this package chose it."""
        there = [found for found in stored if found is not None]
        scales = sorted({float(found.weight.global_scale) for found in there})
        if len(scales) > 1 and not self.foreign:
            yield (
                f"{' and '.join(found.where(layout.suffixes[2]) for found in there)}: they have "
                f"different global scales ({', '.join(f'{scale:.6g}' for scale in scales)}), but "
                "engines fuse them under one; quantize again"
            )
