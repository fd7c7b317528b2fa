"""Reading both sides again: is every tensor there, sane, and close to what it came from?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from quantize.checkpoint import Checkpoint, TensorInfo
from quantize.errors import QuantizeError
from quantize.experts import ExpertGroup, find, source_names
from quantize.gates import KEY, Gate, from_contract
from quantize.identify import identify
from quantize.layouts import Layout, detect
from quantize.nvfp4 import bad_scales
from quantize.pipeline import outputs
from quantize.shards import Output

IMPLAUSIBLE = 0.5
"""Relative error above which a weight cannot be the source's: NVFP4 leaves about 0.1."""


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


def verify(
    source: Checkpoint,
    target: Checkpoint,
    gate: Gate | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Compare the quantized ``target`` with ``source``, tensor by tensor.

    Args:
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
    groups = find(source)
    truth = gate or identify(source.folder)
    _check_gate(target, truth, report)

    expected: set[str] = set()
    for group in groups:
        report.layers.append(_layer(source, target, group, truth, layout, expected, report))
        progress(sum(source.tensors[name].nbytes for name in group.sources))
    experts = source_names(groups)
    for name, info in source.tensors.items():
        if name not in experts:
            expected.add(name)
            _check_copy(source, target, info, report)
            progress(info.nbytes)
    report.problems += [
        f"{target.tensors[name].file.name}: {name} is not in the source"
        for name in target.tensors
        if name not in expected
    ]
    return report


def _check_gate(target: Checkpoint, truth: Gate, report: Report) -> None:
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


def _layer(
    source: Checkpoint,
    target: Checkpoint,
    group: ExpertGroup,
    gate: Gate,
    layout: Layout,
    expected: set[str],
    report: Report,
) -> LayerError:
    noise = signal = 0.0
    for expert in range(group.num_experts):
        weights = (
            *group.gate_up(source, expert, gate.interleaved),
            group.down(source, expert),
        )
        for module, weight in zip(group.modules(expert), weights, strict=True):
            wanted = outputs(module, (weight.shape[0], weight.shape[1]), layout)
            expected.update(out.name for out in wanted)
            restored = _restore(target, wanted, layout, report)
            if restored is None:
                continue
            original = weight.float()
            lost = float((restored - original).square().sum(dtype=torch.float64))
            whole = float(original.square().sum(dtype=torch.float64))
            if not lost <= IMPLAUSIBLE**2 * whole:
                error = math.sqrt(lost / whole) if whole else math.inf
                report.problems.append(
                    f"{module}: relative error {error:.3g}; these are not the source's weights"
                )
            noise, signal = noise + lost, signal + whole
    return LayerError(group.prefix, math.sqrt(noise / signal) if signal else 0.0)


def _restore(
    target: Checkpoint, wanted: tuple[Output, ...], layout: Layout, report: Report
) -> torch.Tensor | None:
    """The dequantized weight; None, with the problems noted, if its tensors are not sane."""
    before = len(report.problems)
    for name, dtype, dims in wanted:
        info = target.tensors.get(name)
        if info is None:
            report.problems.append(f"{name} is missing")
        elif (info.dtype, info.shape) != (dtype, dims):
            report.problems.append(
                f"{info.file.name}: {name} is {info.dtype} {list(info.shape)}, "
                f"expected {dtype} {list(dims)}"
            )
    if len(report.problems) > before:
        return None
    tensors = tuple(target.load(out.name) for out in wanted)
    for out, tensor in zip(wanted[1:], tensors[1:], strict=True):
        if problem := bad_scales(tensor):
            report.problems.append(f"{target.tensors[out.name].file.name}: {out.name}: {problem}")
    if len(report.problems) > before:
        return None
    weight, _ = layout.restore(tensors)
    return weight.dequantize()


def _check_copy(source: Checkpoint, target: Checkpoint, info: TensorInfo, report: Report) -> None:
    copy = target.tensors.get(info.name)
    if copy is None:
        report.problems.append(f"{info.name} is missing")
    elif (copy.dtype, copy.shape) != (info.dtype, info.shape):
        report.problems.append(
            f"{copy.file.name}: {info.name} is {copy.dtype} {list(copy.shape)}, "
            f"the source's {info.dtype} {list(info.shape)}"
        )
    else:
        ours, theirs = (c.load(info.name).reshape(-1).view(torch.uint8) for c in (target, source))
        if not torch.equal(ours, theirs):
            report.problems.append(f"{copy.file.name}: {info.name} differs from the source")
