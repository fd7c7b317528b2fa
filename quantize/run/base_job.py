"""The jobs that round to 8 bits: one linear beside the experts, or the weights of one expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import DamagedWeightsError
from quantize.layouts.base import BASES
from quantize.layouts.base.base_format import BaseFormat, stored_base
from quantize.run.jobs import QuantizeExpert
from quantize.run.shards import ShardWriter
from quantize.run.weight_error import WeightError
from quantize.run.worker import Worker


@dataclass(frozen=True)
class RoundBase:
    """Writes one linear in a base format; see ``quantize.run.jobs.Job``.

    Attributes:
        name: of the weight, ``[out, in]``.
        base: a key of ``quantize.layouts.base.BASES``.
        layout: a key of ``quantize.layouts.LAYOUTS``.
    """

    name: str
    shape: tuple[int, int]
    base: str
    layout: str
    nbytes: int

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.module,)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return stored_base(self.module, self.shape, BASES[self.base], self.layout)

    @property
    def written(self) -> int:
        return sum(out.nbytes for out in self.outputs)

    @property
    def memory(self) -> int:
        rows, columns = self.shape
        return self.nbytes + 16 * rows * columns  # a few copies in float32

    def will_need(self, checkpoint: Checkpoint) -> None:
        checkpoint.will_need(self.name)

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        weight = worker.load(self.name)
        return [_round(self, self.module, weight, self.outputs, BASES[self.base], worker, writer)]


@dataclass(frozen=True)
class RoundExpert:
    """Writes one expert's gate and up, or its down, in a base format.

    Attributes:
        job: the job that would have made them NVFP4; both read the same tensors.
        base: a key of ``quantize.layouts.base.BASES``.
    """

    job: QuantizeExpert
    base: str

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return self.job.tensor_names

    @property
    def modules(self) -> tuple[str, ...]:
        return self.job.modules

    @property
    def stored(self) -> list[tuple[TensorInfo, TensorInfo]]:
        """Codes and scale of each of ``modules``."""
        shape, layout = self.job.group.shapes[0 if self.job.gate_up else -1], self.job.layout.name
        return [stored_base(name, shape, BASES[self.base], layout, True) for name in self.modules]

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return tuple(out for pair in self.stored for out in pair)

    @property
    def nbytes(self) -> int:
        return self.job.nbytes

    @property
    def written(self) -> int:
        return sum(out.nbytes for out in self.outputs)

    @property
    def memory(self) -> int:
        # One weight after another, with a few copies in float32.
        return self.job.memory + 16 * self.job.group.intermediate * self.job.group.hidden

    def will_need(self, checkpoint: Checkpoint) -> None:
        self.job.will_need(checkpoint)

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        base, weights = BASES[self.base], self.job.weights(worker)
        return [
            _round(self, module, weight, stored, base, worker, writer)
            for module, weight, stored in zip(self.modules, weights, self.stored, strict=True)
        ]


def _round(
    job: RoundBase | RoundExpert,
    module: str,
    weight: torch.Tensor,
    stored: Sequence[TensorInfo],
    base: BaseFormat,
    worker: Worker,
    writer: ShardWriter,
) -> WeightError:
    """Write one weight as codes and scale, ``stored``; returns what it lost."""
    if not torch.isfinite(weight).all():
        files = worker.checkpoint.files_of(job.tensor_names)
        read = [name for name in job.tensor_names if name != f"{module}.weight"]
        of = f" ({', '.join(read)})" if len(read) == len(job.tensor_names) else ""
        raise DamagedWeightsError(
            f"{', '.join(sorted(files))}: {module}.weight{of} holds NaN or infinite weights; the "
            "source is damaged: get it again, and go on with --resume",
            files,
        )
    codes, scale = base.encode(weight)
    for out, tensor in zip(stored, (codes, scale), strict=True):
        writer.write(out.name, worker.to_host(tensor))
    lost = (base.decode(codes, scale) - weight.float()).double().square().sum()
    signal = weight.double().square().sum()
    return WeightError(module, float(lost), float(signal), [])
