"""The quantized weights of the target: are their tensors sane, and are they what they must be?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.layouts.layout import INPUT_SCALE, Layout, stored_tensors
from quantize.nvfp4.format import BLOCK, IMPLAUSIBLE, NvFp4, bad_scales
from quantize.nvfp4.kernels.kernel import NotFiniteError, quantize_weights, shared_scale
from quantize.run.convert import Stored, nothing_lost, stored_tensors_of
from quantize.run.worker import Worker
from quantize.verify.blocks import ROWS, Blocks, Bounds, compare_blocks, place
from quantize.verify.results import Lost

_LEAST, _LARGEST = 1e-12, 1e6
"""Of plausible input scales. They stand for largest inputs of 3e-9 and 3e9."""


@dataclass
class Part:
    """What one task found."""

    prefix: str | None = None
    lost: list[Lost] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


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
        carried: reads what they are in the source, if that is NVFP4: they must be the same.
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

    def outputs(self, layout: Layout) -> list[tuple[TensorInfo, ...]]:
        """The tensors that must store each of them."""
        pairs = zip(self.modules, self.shapes, strict=True)
        return [stored_tensors(module, shape, layout) for module, shape in pairs]

    def check(self, target: Checkpoint, layout: Layout, worker: Worker) -> tuple[Part, int]:
        """Check their tensors; return what was found and ``nbytes``."""
        part = Part(self.prefix)
        stored = [_load(target, outs, worker, part) for outs in self.outputs(layout)]
        if self.carried is not None:
            self._check_carried(self.carried(worker), target, layout, stored, part)
            return part, self.nbytes
        self._check_input_scales(target, layout, stored, part)
        if self.load is None:
            self._check_shared(target, layout, stored, part)
            return part, self.nbytes
        weights = self.load(worker)
        try:
            if self.rule is not None:
                self._check_bits(target, layout, weights, stored, worker, part)
            else:
                self._check_bounds(target, layout, weights, stored, worker, part)
        except NotFiniteError:
            part.problems.append(
                f"{' and '.join(self.modules)}: the source's weights are NaN or infinite; it is "
                "damaged: get it again"
            )
            unknown = torch.zeros(127, dtype=torch.int64)
            part.lost += [Lost(module, math.nan, math.nan, unknown) for module in self.modules]
        return part, self.nbytes

    def blocks(
        self, target: Checkpoint, layout: Layout, worker: Worker, module: str
    ) -> Blocks | None:
        """What each block of one of the weights lost; None if it cannot be read."""
        number = self.modules.index(module)
        stored = _load(target, self.outputs(layout)[number], worker, Part())
        if stored is None or self.load is None:
            return None
        return compare_blocks(self.load(worker)[number], layout.restore(stored)[0])

    def _check_carried(
        self,
        weights: list[Stored],
        target: Checkpoint,
        layout: Layout,
        stored: list[dict[str, torch.Tensor] | None],
        part: Part,
    ) -> None:
        """Compare with the source's own NVFP4 weights, bit by bit."""
        for module, weight, found in zip(self.modules, weights, stored, strict=True):
            if found is None:
                continue
            before = len(part.problems)
            try:
                wanted = stored_tensors_of(weight, layout)
            except ArithmeticError as error:
                part.problems.append(f"{module}: {error} in the source; get it again")
                continue
            for suffix, tensor in wanted.items():
                _compare(target, module, suffix, found[suffix], tensor, None, part)
            lost = nothing_lost(module, weight[0])
            noise = lost.noise if len(part.problems) == before else math.nan
            part.lost.append(Lost(module, noise, lost.signal, torch.tensor(lost.counts)))

    def _check_bits(
        self,
        target: Checkpoint,
        layout: Layout,
        weights: list[torch.Tensor],
        stored: list[dict[str, torch.Tensor] | None],
        worker: Worker,
        part: Part,
    ) -> None:
        """Quantize again, and compare bit by bit."""
        assert self.rule is not None
        results = quantize_weights(weights, self.rule, worker.kernel)
        for module, weight, result, found in zip(
            self.modules, weights, results, stored, strict=True
        ):
            if found is None:
                continue
            before = len(part.problems)
            for suffix, wanted in layout.store(result.weight).items():
                _compare(target, module, suffix, found[suffix], wanted, self.rule, part)
            noise, signal = result.noise, result.signal
            if len(part.problems) > before:
                noise, signal = worker.kernel.compare(weight, layout.restore(found)[0])
            part.lost.append(Lost(module, noise, signal, result.counts))

    def _check_bounds(
        self,
        target: Checkpoint,
        layout: Layout,
        weights: list[torch.Tensor],
        stored: list[dict[str, torch.Tensor] | None],
        worker: Worker,
        part: Part,
    ) -> None:
        """Compare with what roundings can lose, see ``quantize.verify.blocks``."""
        if self.global_rule is not None:
            scale = shared_scale(weights, worker.kernel, self.global_rule)
            for module, found in zip(self.modules, stored, strict=True):
                if found is not None:
                    whole = layout.restore(found)[0]
                    wanted = layout.store(NvFp4(whole.codes, whole.block_scale, scale))
                    for suffix in layout.suffixes[2:3]:
                        _compare(
                            target, module, suffix, found[suffix], wanted[suffix],
                            self.global_rule, part,
                        )  # fmt: skip
        else:
            self._check_shared(target, layout, stored, part)
        for module, weight, found in zip(self.modules, weights, stored, strict=True):
            if found is None:
                continue
            whole = layout.restore(found)[0]
            noise, signal = worker.kernel.compare(weight, whole)
            bits = whole.block_scale.contiguous().view(torch.uint8).flatten()
            counts = torch.bincount(bits, minlength=127)
            part.lost.append(Lost(module, noise, signal, counts))
            problem = compare_blocks(weight, whole).problem(self.bounds)
            if not problem and not noise <= IMPLAUSIBLE**2 * signal:
                problem = "these are not the source's weights"
            if problem:
                name = f"{module}.{layout.suffixes[0]}"
                part.problems.append(
                    f"{target.tensors[name].file.name}: {name}: relative error "
                    f"{part.lost[-1].relative:.3g}; {problem}; quantize again"
                )

    def _check_input_scales(
        self,
        target: Checkpoint,
        layout: Layout,
        stored: list[dict[str, torch.Tensor] | None],
        part: Part,
    ) -> None:
        """Input scales are plausible, those of weights with the same inputs are equal, and without
        a text they are 1.0."""
        suffixes = list(layout.store_input_scale(INPUT_SCALE))
        scales = []
        for module, found in zip(self.modules, stored, strict=True):
            if found is None or not suffixes:
                continue
            name = f"{module}.{suffixes[0]}"
            file = target.tensors[name].file.name
            scale = layout.restore(found)[1]
            scales.append(scale)
            value = float("nan") if scale is None else float(scale)
            if not self.text and value != INPUT_SCALE:
                part.problems.append(
                    f"{file}: {name} stands for an input scale of {value:.6g}, but without a text "
                    f"all are {INPUT_SCALE}; quantize again"
                )
            elif not _LEAST <= value <= _LARGEST:
                part.problems.append(
                    f"{file}: {name} stands for an input scale of {value:.6g}, for which no model "
                    "has inputs; quantize again"
                )
        alike = {float(scale) for scale in scales if scale is not None}
        if len(alike) > 1 and self.text and self.fused and not (part.problems or self.foreign):
            part.problems.append(
                f"{' and '.join(self.modules)} have the same inputs, but input scales of "
                f"{' and '.join(f'{scale:.6g}' for scale in sorted(alike))}; quantize again"
            )

    @property
    def fused(self) -> bool:
        """Whether they are an expert's gate and up, which have the same inputs."""
        return len(self.modules) > 1

    def _check_shared(
        self,
        target: Checkpoint,
        layout: Layout,
        stored: list[dict[str, torch.Tensor] | None],
        part: Part,
    ) -> None:
        """Weights that engines fuse have one global scale, if this package chose it."""
        if self.foreign:
            return
        scales = {
            float(layout.restore(found)[0].global_scale) for found in stored if found is not None
        }
        if len(scales) > 1:
            part.problems.append(
                f"{' and '.join(self.modules)} have different global scales "
                f"({', '.join(f'{scale:.6g}' for scale in sorted(scales))}), but engines fuse them "
                "under one; quantize again"
            )


def _load(
    target: Checkpoint, wanted: tuple[TensorInfo, ...], worker: Worker, part: Part
) -> dict[str, torch.Tensor] | None:
    """A weight's tensors by suffix; None, with the problems noted, if they are not sane."""
    before = len(part.problems)
    part.problems += misfits(target, wanted)
    if len(part.problems) > before:
        return None
    loaded = {out.name.rpartition(".")[2]: target.load(out.name, worker.arena) for out in wanted}
    for out, (suffix, tensor) in zip(wanted, loaded.items(), strict=True):
        if suffix != wanted[0].name.rpartition(".")[2] and (problem := bad_scales(tensor)):
            file = target.tensors[out.name].file.name
            part.problems.append(f"{file}: {out.name}: {problem}; quantize again")
    return None if len(part.problems) > before else loaded


def misfits(target: Checkpoint, wanted: tuple[TensorInfo, ...]) -> Iterator[str]:
    """Which tensors are missing, or of another dtype or shape."""
    for name, dtype, dims, *_ in wanted:
        info = target.tensors.get(name)
        if info is None:
            yield f"{name} is missing; complete the download, or quantize again"
        elif (info.dtype, info.shape) != (dtype, dims):
            yield (
                f"{info.file.name}: {name} is {info.dtype} {list(info.shape)}, "
                f"expected {dtype} {list(dims)}; quantize again"
            )


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes, whatever their shapes."""
    left, right = (x.contiguous().reshape(-1).view(torch.uint8) for x in (left, right))
    return torch.equal(left, right)


def _compare(
    target: Checkpoint,
    module: str,
    suffix: str,
    found: torch.Tensor,
    wanted: torch.Tensor,
    rule: str | None,
    part: Part,
) -> None:
    """Note where a tensor's bits are not those that it must have.

    Args:
        rule: the scale rule that makes them; None if they are the source's own.
    """
    size = found.element_size()
    ours, theirs = (
        tensor.contiguous().reshape(-1).view(torch.uint8).view(-1, size)
        for tensor in (found, wanted.to(found.device))
    )
    if torch.equal(ours, theirs):
        return
    name = f"{module}.{suffix}"
    where = f"{target.tensors[name].file.name}: {name}"
    if found.numel() == 1:
        but = f"the rule {rule!r} makes" if rule else "the source's own is"
        of = " of the source's weights" if rule else ""
        part.problems.append(
            f"{where} is {float(found):.9g}, but {but} {float(wanted):.9g}{of}; quantize again"
        )
        return
    wrong = (ours != theirs).any(1).nonzero().flatten()
    row, column = divmod(int(wrong[0]), found.shape[-1])
    block = column * 2 // BLOCK if found.dtype == torch.uint8 else column
    whose = f"what the rule {rule!r} makes of the source's weights" if rule else "the source's"
    part.problems.append(
        f"{where}: {len(wrong)} of {found.numel()} bytes are not {whose}, first in row {row}, "
        f"{place(block)}: an error; quantize again"
    )
