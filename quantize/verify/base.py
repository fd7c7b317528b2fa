"""The target's weights in 8 bits, linears and experts: are they sane, and what the source's give?

Their rounding needs no data, so its bits are made again and compared. Checkpoints of other tools
are compared with what rounding to E4M3 can lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.experts.names import is_expert
from quantize.layouts.base import BASES
from quantize.layouts.base.base_format import CODES, SCALES, BaseFormat, stored_base
from quantize.layouts.layout import Layout
from quantize.nvfp4.format import bad_scales
from quantize.run.worker import Worker
from quantize.verify.claims import BASE
from quantize.verify.results import Lost
from quantize.verify.stored import Part, misfits, not_finite, place_of, same_bits

_MOST = 0.05
"""Relative error that rounding to E4M3 does not reach: about 0.026 for weights of any kind, and one
step of a code is at most 1/8 of it."""

_E8M0_NAN = 255


def base_modules(target: Checkpoint) -> dict[str, BaseFormat]:
    """The format of each weight in 8 bits, by module path, as its scale's dtype tells."""
    kinds = {"U8": BASES["mxfp8"], "F32": BASES["fp8"]}
    found = {}
    for name, info in target.tensors.items():
        module, _, suffix = name.rpartition(".")
        scales = (target.tensors.get(f"{module}.{name}") for name in SCALES)
        scale = next(filter(None, scales), None)
        if suffix == CODES and info.dtype == "F8_E4M3" and scale and scale.dtype in kinds:
            found[module] = kinds[scale.dtype]
    return found


@dataclass(frozen=True)
class BaseLinear:
    """One weight in 8 bits.

    Attributes:
        source: the names of the source's tensors that hold it, and its shape ``[out, in]``; None if
            there is no source.
        bits: it must be, bit for bit, what the format's rounding makes; else it is bounded.
        nbytes: of the source.
        load: reads the source's weight; None: it is all of one tensor.
        prefix: of the layer's experts, if it is one's.
    """

    module: str
    base: BaseFormat
    source: tuple[tuple[str, ...], tuple[int, int]] | None = None
    bits: bool = False
    nbytes: int = 0
    load: Callable[[Worker], torch.Tensor] | None = None
    prefix: str = BASE

    def outputs(self, shape: tuple[int, int], layout: Layout) -> tuple[TensorInfo, TensorInfo]:
        """The tensors that hold it."""
        expert = is_expert(self.module)
        return stored_base(self.module, shape, self.base, layout.name, expert)

    def check(self, target: Checkpoint, layout: Layout, worker: Worker) -> tuple[Part, int]:
        """Check its tensors; return what was found and ``nbytes``."""
        part = Part(self.prefix)
        part.problems += self._problems(target, layout, worker, part)
        return part, self.nbytes

    def _problems(
        self, target: Checkpoint, layout: Layout, worker: Worker, part: Part
    ) -> Iterator[str]:
        codes = target.tensors.get(f"{self.module}.{CODES}")
        if self.source is not None:
            shape = self.source[1]
        elif codes is None or len(codes.shape) != 2:
            yield (
                f"{target.folder}: {self.module}.{CODES} is missing, or no matrix; complete the "
                "download"
            )
            return
        else:
            shape = codes.shape[0], codes.shape[1]
        wanted = self.outputs(shape, layout)
        if wrong := list(misfits(target, wanted)):
            yield from wrong
            return
        found = [target.load(out.name, worker.arena) for out in wanted]
        where = [place_of(target, out.name) for out in wanted]
        if found[0].float().isnan().any():
            yield f"{where[0]} holds NaN; quantize again"
        if found[1].is_floating_point() and (problem := bad_scales(found[1])):
            yield f"{where[1]}: {problem}; quantize again"
        if found[1].dtype == torch.uint8 and bool((found[1] == _E8M0_NAN).any()):
            yield f"{where[1]} holds NaN; quantize again"
        if self.source is None:
            return
        names = self.source[0]
        weight = self.load(worker) if self.load else worker.load(names[0])
        signal = float(weight.double().square().sum())
        noise = float((self.base.decode(*found) - weight.float()).double().square().sum())
        file, counts = target.tensors[wanted[0].name].file.name, torch.zeros(0, dtype=torch.int64)
        part.lost.append(Lost(self.module, noise, signal, counts, file))
        if not math.isfinite(signal):
            yield not_finite(worker.checkpoint, list(names), [self.module])
            return
        if self.bits:
            for at, ours, theirs in zip(where, found, self.base.encode(weight), strict=True):
                if not same_bits(ours, theirs):
                    yield (
                        f"{at} is not what {self.base.name} makes of the source's weight; quantize "
                        "again"
                    )
        elif not noise <= _MOST**2 * signal:
            yield (
                f"{where[0]} is further from the source's weight than rounding to "
                f"{self.base.name} can be; quantize again"
            )
