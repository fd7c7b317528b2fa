"""The job that rounds one linear beside the experts to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import DamagedWeightsError
from quantize.layouts.base import BASES
from quantize.layouts.base.base_format import CODES, SCALE, stored_base
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
        if not torch.isfinite(weight).all():
            files = worker.checkpoint.files_of(self.tensor_names)
            raise DamagedWeightsError(
                f"{', '.join(sorted(files))}: {self.name} holds NaN or infinite weights; the "
                "source is damaged: get it again, and go on with --resume",
                files,
            )
        base = BASES[self.base]
        codes, scale = base.encode(weight)
        writer.write(f"{self.module}.{CODES}", worker.to_host(codes))
        writer.write(f"{self.module}.{SCALE}", worker.to_host(scale))
        lost = (base.decode(codes, scale) - weight.float()).double().square().sum()
        signal = weight.double().square().sum()
        return [WeightError(self.module, float(lost), float(signal), [])]
