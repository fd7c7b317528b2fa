"""Reading both sides again: is every tensor there, sane, and close to what it came from?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from threading import local
from typing import Any

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts import linears
from quantize.experts.find import find
from quantize.experts.gates import KEY, Gate, Gates, from_contract
from quantize.experts.group import tensor_names_of
from quantize.experts.identify import identify
from quantize.layouts import detect
from quantize.layouts.layout import Layout, stored_tensors
from quantize.nvfp4.format import IMPLAUSIBLE, NvFp4, bad_scales
from quantize.run.jobs import PIECE, Biases, QuantizeExpert
from quantize.run.plan import expert_jobs
from quantize.run.worker import Worker
from quantize.run.workers import cores, threads_of_our_own


@dataclass(frozen=True)
class LayerError:
    """How far one layer's dequantized experts are from the source's.

    Attributes:
        prefix: the layer's experts.
        relative: ``norm(dequantized - source) / norm(source)``.
    """

    prefix: str
    relative: float

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, in dB."""
        return -20 * math.log10(self.relative) if self.relative > 0 else math.inf


@dataclass
class Report:
    """Result of :func:`verify`; ``problems`` is empty if the checkpoint is good."""

    layers: list[LayerError] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values. A number that is not finite is null: the SQNR of no loss."""
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "layers": [
                {
                    "prefix": layer.prefix,
                    "relative_error": layer.relative if math.isfinite(layer.relative) else None,
                    "sqnr_db": layer.sqnr if math.isfinite(layer.sqnr) else None,
                }
                for layer in self.layers
            ],
        }


@dataclass
class _Part:
    """What one task found."""

    prefix: str | None = None
    noise: float = 0.0
    signal: float = 0.0
    problems: list[str] = field(default_factory=list)


_Task = Callable[[Worker], tuple[_Part, int]]
"""Compares something; also says how many bytes of the source it was."""


def verify(
    source: Checkpoint,
    target: Checkpoint,
    gate: Gate | None = None,
    progress: Callable[[int], None] = lambda _: None,
    trust_remote_code: bool = False,
) -> Report:
    """Compare the quantized ``target`` with ``source``, tensor by tensor, on all cores.

    Args:
        target: opened with ``decode=False``.
        gate: the experts' gate, if the user states it; else it is identified from the source.
        progress: told how many bytes of the source have just been compared.
    """
    report = Report()
    quantization = target.config.get("quantization_config")
    layout = detect(quantization) if isinstance(quantization, dict) else None
    if layout is None:
        report.problems.append(
            f"{target.folder / 'config.json'}: no NVFP4 quantization_config in a known layout"
        )
        return report
    gates = Gates.uniform(gate) if gate else identify(source.folder, trust_remote_code)
    _check_gate(target, gates, report)
    comparison = _Comparison(source, target, layout, gates)
    lost: dict[str, tuple[float, float]] = {}
    tasks = list(comparison.tasks())
    if not comparison.quantized:
        report.problems.append(f"{target.folder}: none of the source's experts is quantized")
    for part, nbytes in _in_threads(source, tasks, cores(comparison.memory)):
        report.problems += part.problems
        if part.prefix is not None:
            noise, signal = lost.get(part.prefix, (0.0, 0.0))
            lost[part.prefix] = (noise + part.noise, signal + part.signal)
        progress(nbytes)
    report.layers = [
        LayerError(prefix, math.sqrt(noise / signal) if signal else 0.0)
        for prefix, (noise, signal) in lost.items()
    ]
    report.problems += [
        f"{target.tensors[name].file.name}: {name} is not in the source"
        for name in target.tensors
        if name not in comparison.expected
    ]
    return report


def _in_threads(source: Checkpoint, tasks: list[_Task], count: int) -> Iterator[tuple[_Part, int]]:
    """Results in the order of ``tasks``, of which only a few are held at a time."""
    waiting = iter(tasks)
    thread = local()

    def run(task: _Task) -> tuple[_Part, int]:
        if not hasattr(thread, "worker"):
            thread.worker = Worker(source, torch.device("cpu"))
        thread.worker.arena.reset()
        return task(thread.worker)

    with threads_of_our_own(), ThreadPoolExecutor(count, "verify") as pool:
        pending = [pool.submit(run, task) for task in islice(waiting, 2 * count)]
        while pending:
            yield pending.pop(0).result()
            pending += [pool.submit(run, task) for task in islice(waiting, 1)]


@dataclass
class _Comparison:
    source: Checkpoint
    target: Checkpoint
    layout: Layout
    gates: Gates
    expected: set[str] = field(default_factory=set)
    quantized: bool = False
    memory: int = 0

    def tasks(self) -> Iterator[_Task]:
        groups = find(self.source, self._has_nvfp4_below)
        quantized = [
            group
            for group in groups
            if self._has_nvfp4(m for e in range(group.num_experts) for m in group.modules(e))
        ]
        dense = [
            name
            for names in linears.find(self.source, groups)
            for name in names
            if self._has_nvfp4([name.removesuffix(".weight")])
        ]
        self.quantized = bool(quantized or dense)
        for group in quantized:
            interleaved = self.gates.of(group.prefix).interleaved
            for expert in range(group.num_experts):
                for job in expert_jobs(self.source, group, expert, interleaved, self.layout, "max"):
                    self.expected.update(out.name for out in job.outputs)
                    self.memory = max(self.memory, job.memory)
                    if isinstance(job, Biases):
                        yield partial(self._biases, job)
                    else:
                        yield partial(self._expert, job)
        for name in dense:
            rows, columns = self.source.tensors[name].shape
            outs = stored_tensors(name.removesuffix(".weight"), (rows, columns), self.layout)
            self.expected.update(out.name for out in outs)
            yield partial(self._linear, name, outs)
        done = tensor_names_of(quantized) | set(dense)
        for name, info in self.source.tensors.items():
            if name not in done:
                self.expected.add(name)
                yield partial(self._copy, info)

    def _has_nvfp4(self, modules: Iterable[str]) -> bool:
        """Whether the target has any tensor of these modules in NVFP4; else they should be copies.

        ModelOpt's codes are called as the source's weights are.
        """
        for name in (f"{module}.{end}" for module in modules for end in self.layout.suffixes):
            found, original = self.target.tensors.get(name), self.source.tensors.get(name)
            if found and (original is None or found.dtype != original.dtype):
                return True
        return False

    def _has_nvfp4_below(self, prefix: str) -> bool:
        """Whether the target has any block scales of experts at the module path ``prefix``."""
        end = f".{self.layout.suffixes[1]}"
        return any(n.startswith(f"{prefix}.") and n.endswith(end) for n in self.target.tensors)

    def _expert(self, job: QuantizeExpert, worker: Worker) -> tuple[_Part, int]:
        part = _Part(job.group.prefix)
        count = len(self.layout.suffixes)
        for i, (module, weight) in enumerate(zip(job.modules, job.weights(worker), strict=True)):
            self._weight(module, weight, job.outputs[count * i : count * (i + 1)], worker, part)
        return part, job.nbytes

    def _linear(self, name: str, outs: tuple[TensorInfo, ...], worker: Worker) -> tuple[_Part, int]:
        part = _Part("dense linears")
        self._weight(name.removesuffix(".weight"), worker.load(name), outs, worker, part)
        return part, self.source.stored_bytes(name)

    def _weight(
        self,
        module: str,
        weight: torch.Tensor,
        wanted: tuple[TensorInfo, ...],
        worker: Worker,
        part: _Part,
    ) -> None:
        restored = self._restore(wanted, worker, part)
        if restored is None:
            return
        noise, signal = worker.kernel.compare(weight, restored)
        if not noise <= IMPLAUSIBLE**2 * signal:
            error = math.sqrt(noise / signal) if signal else math.inf
            part.problems.append(
                f"{module}: relative error {error:.3g}; these are not the source's weights"
            )
        part.noise += noise
        part.signal += signal

    def _restore(self, wanted: tuple[TensorInfo, ...], worker: Worker, part: _Part) -> NvFp4 | None:
        """The stored weight; None, with the problems noted, if its tensors are not sane."""
        before = len(part.problems)
        for name, dtype, dims, *_ in wanted:
            info = self.target.tensors.get(name)
            if info is None:
                part.problems.append(f"{name} is missing")
            elif (info.dtype, info.shape) != (dtype, dims):
                part.problems.append(
                    f"{info.file.name}: {name} is {info.dtype} {list(info.shape)}, "
                    f"expected {dtype} {list(dims)}"
                )
        if len(part.problems) > before:
            return None
        loaded = [self.target.load(out.name, worker.arena) for out in wanted]
        for out, tensor in zip(wanted[1:], loaded[1:], strict=True):
            if problem := bad_scales(tensor):
                file = self.target.tensors[out.name].file.name
                part.problems.append(f"{file}: {out.name}: {problem}")
        if len(part.problems) > before:
            return None
        return self.layout.restore(dict(zip(self.layout.suffixes, loaded, strict=True)))[0]

    def _biases(self, job: Biases, worker: Worker) -> tuple[_Part, int]:
        part, group = _Part(), job.group
        for module, bias in group.biases(worker, job.expert, job.interleaved).items():
            name = f"{module}.bias"
            if name not in self.target.tensors:
                part.problems.append(f"{name} is missing")
            elif self.target.tensors[name].dtype != self.source.tensors[group.bias_names[0]].dtype:
                file = self.target.tensors[name].file.name
                part.problems.append(f"{file}: {name} has another dtype than the source's")
            elif not torch.equal(self.target.load(name), bias):
                file = self.target.tensors[name].file.name
                part.problems.append(f"{file}: {name} differs from the source")
        return part, job.nbytes

    def _copy(self, info: TensorInfo, worker: Worker) -> tuple[_Part, int]:
        part = _Part()
        copy = self.target.tensors.get(info.name)
        if copy is None:
            part.problems.append(f"{info.name} is missing")
        elif (copy.dtype, copy.shape) != (info.dtype, info.shape):
            part.problems.append(
                f"{copy.file.name}: {info.name} is {copy.dtype} {list(copy.shape)}, "
                f"the source's {info.dtype} {list(info.shape)}"
            )
        elif not self._same(info, copy, worker):
            part.problems.append(f"{copy.file.name}: {info.name} differs from the source")
        return part, self.source.stored_bytes(info.name)

    def _same(self, info: TensorInfo, copy: TensorInfo, worker: Worker) -> bool:
        if self.source.parts(info.name) != (info.name,):
            return all(
                torch.equal(ours.view(torch.uint8), decoded.bfloat16().view(torch.uint8))
                for ours, decoded in self._decoded(info, worker)
            )
        size = min(PIECE, info.nbytes)
        left, right = worker.arena.take(size), worker.arena.take(size)
        for start in range(0, info.nbytes, PIECE):
            count = min(PIECE, info.nbytes - start)
            self.source.read_into(left[:count], info, start)
            self.target.read_into(right[:count], copy, start)
            if not torch.equal(left[:count], right[:count]):
                return False
        return True

    def _decoded(
        self, info: TensorInfo, worker: Worker
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A copy and the source's weight, dequantized: of stacked experts, one after another."""
        if len(info.shape) != 3:
            yield self.target.load(info.name, worker.arena), worker.load(info.name)
            return
        for expert in range(info.shape[0]):
            worker.arena.reset()
            copy = self.target.load_expert(info.name, expert, arena=worker.arena)
            yield copy, worker.load_expert(info.name, expert).contiguous()


def _check_gate(target: Checkpoint, truth: Gates, report: Report) -> None:
    where = str(target.folder / "config.json")
    if KEY not in target.config:
        report.problems.append(f"{where}: no gate contract ({KEY})")
        return
    try:
        written = from_contract(target.config[KEY], where)
    except QuantizeError as error:
        report.problems.append(str(error))
        return
    if written != truth.concatenated():
        report.problems.append(f"{where}: the gate is {written}, but the source's is {truth}")
