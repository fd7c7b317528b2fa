"""The jobs that a run consists of: each makes some tensors of the output from some of the source.

A job depends on no other job, so jobs run in any order, on any thread, device or machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import DamagedWeightsError
from quantize.experts.group import ExpertGroup
from quantize.layouts.layout import INPUT_SCALE, Layout, stored_nbytes, stored_tensors
from quantize.nvfp4.kernels.kernel import NotFiniteError, quantize_weights
from quantize.run.shards import ShardWriter
from quantize.run.staged import Staged
from quantize.run.weight_error import WeightError
from quantize.run.worker import Worker

PIECE = 16 * 2**20
"""Bytes of a tensor copied or compared at a time."""


class Job(Protocol):
    """One job.

    Attributes:
        outputs: the tensors that it writes.
        tensor_names: of the source tensors that it reads, keys of ``Checkpoint.tensors``.
        modules: module paths of the weights that it quantizes.
        nbytes: how many bytes of the source it reads, as they are stored.
        written: bytes of ``outputs``.
        memory: how many bytes it needs at most while it runs.
    """

    @property
    def tensor_names(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[TensorInfo, ...]: ...
    @property
    def modules(self) -> tuple[str, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def written(self) -> int: ...
    @property
    def memory(self) -> int: ...

    def will_need(self, checkpoint: Checkpoint) -> None:
        """Ask the system to read from disk what the job will need."""

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        """Write ``outputs``; returns what each quantized weight lost."""


@dataclass(frozen=True)
class Copy:
    """Copies a tensor byte for byte; one in a quantized format is dequantized to bfloat16."""

    output: TensorInfo
    nbytes: int
    decoded: bool

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return (self.output,)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return (self.output.name,)

    @property
    def modules(self) -> tuple[str, ...]:
        return ()

    @property
    def written(self) -> int:
        return self.output.nbytes

    @property
    def memory(self) -> int:
        if not self.decoded:
            return min(PIECE, self.nbytes)
        return 4 * self.output.nbytes // (self.output.shape[0] if self._stacked else 1)

    @property
    def _stacked(self) -> bool:
        return len(self.output.shape) == 3

    def will_need(self, checkpoint: Checkpoint) -> None:
        checkpoint.will_need(self.output.name)

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        name = self.output.name
        if self.decoded and self._stacked:
            size = self.output.nbytes // self.output.shape[0]
            for expert in range(self.output.shape[0]):
                worker.arena.reset()
                decoded = worker.load_expert(name, expert).bfloat16().contiguous()
                writer.write(name, worker.to_host(decoded), expert * size)
            return []
        if self.decoded:
            writer.write(name, worker.to_host(worker.load(name).bfloat16().contiguous()))
            return []
        info = worker.checkpoint.stored[name]
        buffer = worker.arena.take(min(PIECE, self.nbytes))
        for start in range(0, self.nbytes, PIECE):
            piece = buffer[: min(PIECE, self.nbytes - start)]
            worker.checkpoint.read_into(piece, info, start)
            writer.write(name, piece, start)
        return []


@dataclass(frozen=True)
class QuantizeExpert:
    """Quantizes one expert's gate and up, which share a global scale, or its down.

    Attributes:
        gate_up: whether it does gate and up, or else down.
        interleaved: rows of a fused ``gate_up_proj`` alternate between gate and up.
        rule: a key of ``quantize.nvfp4.scales.RULES``.
        nbytes: how many bytes of the source it reads.
        decoded: the source is stored in a quantized format, and comes as float32.
        input_scale: where the layout has input scales.
    """

    group: ExpertGroup
    expert: int
    gate_up: bool
    interleaved: bool
    layout: Layout
    rule: str
    nbytes: int
    decoded: bool
    input_scale: float = INPUT_SCALE

    @property
    def modules(self) -> tuple[str, ...]:
        """The written weights' module paths."""
        modules = self.group.modules(self.expert)
        return modules[:-1] if self.gate_up else modules[-1:]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The tensors that are read."""
        weights = self.group.weights_of(self.expert)
        return weights[:-1] if self.gate_up else weights[-1:]

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        shape = self.group.shapes[0 if self.gate_up else -1]
        return tuple(
            out for name in self.modules for out in stored_tensors(name, shape, self.layout)
        )

    @property
    def written(self) -> int:
        shape = self.group.shapes[0 if self.gate_up else -1]
        return len(self.modules) * stored_nbytes(shape, self.layout)

    @property
    def memory(self) -> int:
        weights = self.group.intermediate * self.group.hidden * len(self.modules)
        floats = 4 * weights if self.decoded else self.nbytes
        # Splitting interleaved rows and transposing each make a copy.
        copies = self.interleaved + (self.group.transposed or self.group.flat)
        source = self.nbytes * self.decoded + floats * (1 + copies)
        return source + self.written

    def weights(self, worker: Worker) -> list[torch.Tensor]:
        """The source's weights, each ``[out, in]``, one for each of ``modules``."""
        if self.gate_up:
            return list(self.group.gate_up(worker, self.expert, self.interleaved))
        return [self.group.down(worker, self.expert)]

    def will_need(self, checkpoint: Checkpoint) -> None:
        group = self.group
        experts = group.num_experts if group.flat else None
        for name in self.tensor_names:
            checkpoint.will_need(name, self.expert if group.fused else None, experts)

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        return _quantize(self, self.weights(worker), self.input_scale, worker, writer)


@dataclass(frozen=True)
class KeepRounded:
    """Keeps an expert's weights that calibration has written into the shard already.

    Attributes:
        job: the job that would have quantized them; both write the same tensors.
        staged: what calibration has written.
    """

    job: QuantizeExpert
    staged: Staged

    @property
    def modules(self) -> tuple[str, ...]:
        """The written weights' module paths."""
        return self.job.modules

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The tensors that calibration read; they are not read again."""
        return self.job.tensor_names

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return self.job.outputs

    @property
    def nbytes(self) -> int:
        return self.job.nbytes

    @property
    def written(self) -> int:
        return self.job.written

    @property
    def memory(self) -> int:
        return 0

    def will_need(self, checkpoint: Checkpoint) -> None:
        """Does nothing: the job reads no tensor of the source."""

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        for out in self.outputs:
            writer.there(out.name)
        return self.staged.lost(self.job.group, self.modules)


@dataclass(frozen=True)
class QuantizeLinears:
    """Quantizes dense linears that share a global scale, since an engine may fuse them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    layout: Layout
    rule: str
    nbytes: int
    decoded: bool

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return self.names

    @property
    def modules(self) -> tuple[str, ...]:
        """The written weights' module paths."""
        return tuple(name.removesuffix(".weight") for name in self.names)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        pairs = zip(self.modules, self.shapes, strict=True)
        return tuple(
            out for name, shape in pairs for out in stored_tensors(name, shape, self.layout)
        )

    @property
    def written(self) -> int:
        return sum(stored_nbytes(shape, self.layout) for shape in self.shapes)

    @property
    def memory(self) -> int:
        weights = sum(rows * columns for rows, columns in self.shapes)
        return self.nbytes + 4 * weights * self.decoded + self.written

    def will_need(self, checkpoint: Checkpoint) -> None:
        for name in self.names:
            checkpoint.will_need(name)

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        weights = [worker.load(name) for name in self.names]
        return _quantize(self, weights, INPUT_SCALE, worker, writer)


@dataclass(frozen=True)
class Biases:
    """Copies one expert's biases, split and named as its weights are."""

    group: ExpertGroup
    expert: int
    interleaved: bool
    outputs: tuple[TensorInfo, ...]
    nbytes: int

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return self.group.bias_names

    @property
    def modules(self) -> tuple[str, ...]:
        return ()

    @property
    def written(self) -> int:
        return sum(out.nbytes for out in self.outputs)

    @property
    def memory(self) -> int:
        return 4 * self.nbytes

    def will_need(self, checkpoint: Checkpoint) -> None:
        """Does nothing: biases are too small to be worth it."""

    def run(self, worker: Worker, writer: ShardWriter) -> list[WeightError]:
        biases = self.group.biases(worker, self.expert, self.interleaved)
        for module, bias in biases.items():
            if not torch.isfinite(bias).all():
                files = worker.checkpoint.files_of(self.tensor_names)
                raise DamagedWeightsError(
                    f"{', '.join(sorted(files))}: {module}.bias holds NaN or infinite values; the "
                    "source is damaged: get it again, and go on with --resume",
                    files,
                )
            writer.write(f"{module}.bias", worker.to_host(bias))
        return []


def _quantize(
    job: QuantizeExpert | QuantizeLinears,
    weights: list[torch.Tensor],
    input_scale: float,
    worker: Worker,
    writer: ShardWriter,
) -> list[WeightError]:
    modules, tensor_names, layout = job.modules, job.tensor_names, job.layout
    try:
        results = quantize_weights(weights, job.rule, worker.kernel)
    except NotFiniteError:
        files = worker.checkpoint.files_of(tensor_names)
        raise DamagedWeightsError(
            f"{', '.join(sorted(files))}: {' and '.join(modules)} ({', '.join(tensor_names)}) hold "
            "NaN or infinite weights; the source is damaged: get it again, and go on with --resume",
            files,
        ) from None
    lost = []
    for module, result in zip(modules, results, strict=True):
        stored = layout.store(result.weight) | layout.store_input_scale(input_scale)
        for suffix, tensor in stored.items():
            writer.write(f"{module}.{suffix}", worker.to_host(tensor))
        lost.append(WeightError(module, result.noise, result.signal, result.counts.tolist()))
    return lost
