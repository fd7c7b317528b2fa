"""Checking a whole checkpoint, with its source or alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from threading import local

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY, Gate, Gates, from_contract
from quantize.experts.identify import identify
from quantize.experts.names import where_of
from quantize.layouts import detect
from quantize.layouts.layout import Layout
from quantize.nvfp4.format import BLOCK
from quantize.run.worker import Worker
from quantize.run.workers import Progress, cores, not_shown, threads_of_our_own
from quantize.verify.base import BaseLinear, base_modules
from quantize.verify.claims import Claims, read_claims
from quantize.verify.compare import Comparison, Task
from quantize.verify.configs import Modules, config_problems, gate_problems, quantization_problems
from quantize.verify.files import file_problems
from quantize.verify.kv_scales import kv_notes, kv_problems, kv_scales_of
from quantize.verify.report import edited, report_problems
from quantize.verify.results import LayerError, Lost, Report, Worst
from quantize.verify.stored import Part
from quantize.verify.structure import Structure, count_problems, missing_layers, quantized_modules
from quantize.verify.weights import Weights


def verify(
    source: Checkpoint | None,
    target: Checkpoint,
    gate: Gate | None = None,
    progress: Progress = not_shown,
    trust_remote_code: bool = False,
) -> Report:
    """Check the quantized ``target``, on all cores.

    With its source, every tensor is compared: copies bit for bit, weights that were rounded to
    nearest bit for bit with what the recorded rule makes again, and calibrated ones with what
    rounding can lose (``quantize.verify.blocks``) and with the run's report. Without, its parts are
    compared with each other.

    Args:
        source: what it was made of; None if that is not at hand.
        target: opened with ``decode=False``.
        gate: the experts' gate, if the user states it; else it is identified from the source.
        progress: told how many bytes of the source have just been compared, or of the target where
            that is alone.

    Raises:
        QuantizeError: if a file cannot be read, or the source could not be quantized.
    """
    report = Report()
    quantization = target.config.get("quantization_config")
    layout = detect(quantization) if isinstance(quantization, dict) else None
    if layout is None:
        report.problems.append(
            f"{target.folder / 'config.json'}: no NVFP4 quantization_config in a known layout; "
            "take the config.json that the quantizer wrote"
        )
        return report
    claims = read_claims(source, target, report)
    gates = None
    if source is not None:
        gates = Gates.uniform(gate) if gate else identify(source.folder, trust_remote_code)
        report.problems += config_problems(source, target)
    report.problems += gate_problems(target, gates, claims.made is not None)
    report.problems += file_problems(source, target, claims)
    if source is None or gates is None:
        modules = _alone(target, layout, claims, progress, report)
    else:
        comparison = Comparison(source, target, layout, gates, claims)
        modules = _against(comparison, progress, report)
    report.problems += count_problems(target, modules.quantized)
    report.problems += quantization_problems(target, layout, claims, modules)
    report.problems += edited(target, claims, report.problems)
    return report


def _against(comparison: Comparison, progress: Progress, report: Report) -> Modules:
    """Compare all tensors; returns what is quantized and what is not."""
    tasks = list(comparison.tasks())
    report.problems += comparison.problems
    lost: dict[str, list[Lost]] = {weights.prefix: [] for weights in comparison.weights}
    lost |= {linear.prefix: [] for linear in comparison.base}
    before = len(report.problems)
    for part, nbytes in _in_threads(comparison.source, tasks, cores(comparison.memory)):
        report.problems += part.problems
        if part.prefix is not None:
            lost[part.prefix] += part.lost
        progress(nbytes, where_of(part.lost[0].module) if part.lost else "")
    whole = len(report.problems) == before
    for prefix, weights in lost.items():
        if whole:  # else the report's figures differ for reasons that were given
            report.problems += comparison.claims.problems(prefix, weights)
        worst = _worst(comparison, prefix, weights)
        noise, signal = sum(w.noise for w in weights), sum(w.signal for w in weights)
        relative = math.sqrt(noise / signal) if signal else 0.0
        if any(math.isnan(w.noise) for w in weights) or not weights:
            relative = math.nan
        report.layers.append(LayerError(prefix, relative, worst))
    claims = comparison.claims
    of = None if claims.foreign else comparison.source
    report.problems += kv_problems(comparison.target, comparison.kv_scales, claims, of)
    report.notes += kv_notes(comparison.source, claims)
    report.problems += comparison.too_many()
    report.problems += report_problems(
        comparison.target,
        comparison.layout,
        comparison.claims,
        comparison.weights,
        comparison.gates,
        comparison.before,
        comparison.source.nbytes,
        not report.problems,
    )
    return Modules(
        {module for weights in comparison.weights for module in weights.modules},
        comparison.experts_left,
        {linear.module: linear.base for linear in comparison.base},
        {name.rpartition(".")[0] for name in comparison.source.tensors},
    )


def _worst(comparison: Comparison, prefix: str, lost: list[Lost]) -> Worst | None:
    """The weight of a layer that lost most, and its worst block, for which it is read again."""
    if all(weights.prefix != prefix for weights in comparison.weights):
        return None  # in 8 bits
    finite = [weight for weight in lost if math.isfinite(weight.noise)]
    if not finite:
        return None
    most = max(finite, key=lambda weight: weight.relative)
    weights = next(w for w in comparison.weights if w.prefix == prefix and most.module in w.modules)
    worker = Worker(comparison.source, torch.device("cpu"))
    found = weights.blocks(comparison.target, comparison.layout, worker, most.module)
    if found is None:
        return None
    row, block, share = found.worst()
    return Worst(most.module, most.relative, row, BLOCK * block, share)


def _alone(
    target: Checkpoint, layout: Layout, claims: Claims, progress: Progress, report: Report
) -> Modules:
    """Check the target without a source; returns what is quantized and what is not."""
    structure = Structure(target, layout)
    weights = structure.weights(claims)
    if not weights:
        report.problems.append(f"{target.folder}: no tensor is NVFP4, though config.json says so")
    report.problems += structure.problems
    report.problems += missing_layers(structure, claims)
    tasks: list[Task] = [partial(w.check, target, layout) for w in weights]
    base = base_modules(target)
    tasks += [partial(BaseLinear(m, b).check, target, layout) for m, b in base.items()]
    modules = [*(each.modules for each in weights), *((m,) for m in base)]
    memory = max((_memory(w) for w in weights), default=0)
    found = zip(modules, _in_threads(target, tasks, cores(memory)), strict=True)
    done = 0
    for names, (part, _) in found:
        report.problems += part.problems
        progress(target.nbytes_read - done, where_of(f"{names[0]}."))
        done = target.nbytes_read
    progress(max(0, target.nbytes - done))  # nothing is known of the rest
    caches = kv_scales_of(None, target, layout, claims)
    report.problems += kv_problems(target, caches, claims)
    gates = None
    with suppress(QuantizeError, LookupError):  # then it is a problem already
        gates = from_contract(target.config[KEY])
    report.problems += report_problems(
        target, layout, claims, weights, gates, {}, None, not report.problems
    )
    report.notes.append("without the source, only the checkpoint's own parts were compared")
    known = {name.rpartition(".")[0] for name in target.tensors}
    return Modules(quantized_modules(target, layout), set(), base, known)


def _memory(weights: Weights) -> int:
    return sum(rows * columns for rows, columns in weights.shapes)


def _in_threads(source: Checkpoint, tasks: list[Task], count: int) -> Iterator[tuple[Part, int]]:
    """Results in the order of ``tasks``, of which only a few are held at a time."""
    waiting = iter(tasks)
    thread = local()

    def run(task: Task) -> tuple[Part, int]:
        if not hasattr(thread, "worker"):
            thread.worker = Worker(source, torch.device("cpu"))
        thread.worker.arena.reset()
        return task(thread.worker)

    with threads_of_our_own(), ThreadPoolExecutor(count, "verify") as pool:
        pending = [pool.submit(run, task) for task in islice(waiting, 2 * count)]
        while pending:
            yield pending.pop(0).result()
            pending += [pool.submit(run, task) for task in islice(waiting, 1)]
