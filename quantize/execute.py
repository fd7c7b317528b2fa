"""A run: plan, calibrate, shards, finish. The one place that knows all rooms."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.calibration.budget import needed
from quantize.calibration.calibrate import calibrate, unstaged
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.report import dumps, render
from quantize.report.collect import collect
from quantize.run.cluster import make_shards_on_ray
from quantize.run.finish import finish, other_files
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.run.workers import Progress, all_devices, make_shards


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        bytes_read: of the source; a resumed run reads only what was missing.
    """

    seconds: float
    bytes_read: int
    bytes_before: int
    bytes_after: int
    shards: int


def execute(
    checkpoint: Checkpoint,
    plan: Plan,
    target: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    devices: Sequence[torch.device] | None = None,
    threads: int | None = None,
    ray: str | None = None,
    command: str = "",
    progress: Progress = lambda _: None,
    samples: torch.Tensor | None = None,
    calibrating: Callable[[float, int], None] = lambda _, __: None,
    say: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Carry out ``plan`` into the folder ``target``.

    Args:
        overwrite: replace a checkpoint, or an interrupted run, in ``target``.
        resume: go on with an interrupted run; start one if ``target`` is empty; do nothing if it
            is complete.
        devices: what computes; by default :func:`all_devices`.
        threads: how many, on CPUs; by default as many as cores, within ``MEMORY``.
        ray: address of a Ray cluster that makes the shards instead of this machine.
        command: how the run was started, for the report.
        samples: tokens to calibrate with, int64 ``[num_samples, sequence_length]``, if the plan
            says so.
        calibrating: see ``quantize.calibration.progress.Progress``.
        say: is told in a line what the calibration's proof found.

    Raises:
        QuantizeError: if ``target`` is the source, or holds files and neither flag is set; if a
            weight is NaN or infinite; if there is not enough space, or a file cannot be read or
            written. Then ``target`` holds no ``config.json``, and a run can be resumed.
    """
    started = time.perf_counter()
    # The files' own folders too: a source may be a folder of links to them.
    source_folders = {checkpoint.folder, *(file.resolve().parent for file in checkpoint.files)}
    if target.exists() and any(folder.samefile(target) for folder in source_folders):
        raise QuantizeError(f"{target} is the source; choose another folder")
    others = list(other_files(checkpoint.folder))
    record = Record(
        target,
        plan.fingerprint(checkpoint),
        command,
        str(checkpoint.folder),
        {str(file.resolve()): file.stat().st_mtime_ns for file in checkpoint.files},
    )
    every = range(len(plan.shards))

    def summary(missing: Sequence[int]) -> Summary:
        return Summary(
            time.perf_counter() - started,
            _source_bytes(plan, missing),
            checkpoint.nbytes,
            plan.nbytes,
            len(plan.shards),
        )

    if resume and record.is_finished(plan, others):
        record.end()  # a kill in the last moments may have left it
        progress(_source_bytes(plan, every))
        return summary([])
    record.begin(overwrite, resume)
    try:
        record.discard_changed(checkpoint, plan)
        missing = record.missing(plan)
        progress(_source_bytes(plan, [i for i in every if i not in missing]))
        device = (devices or all_devices())[0]
        space = sum(out.nbytes for i in missing for out in plan.outputs(i))
        if plan.options.calibration and unstaged(plan, record.calibration):
            budget = needed(checkpoint, plan, device)
            # An earlier run may have left a part of it.
            there = sum(f.stat().st_size for f in record.calibration.rglob("*") if f.is_file())
            space += max(0, budget.states + budget.staged - there)
        _check_space(target, space)
        if plan.options.calibration and missing:
            assert samples is not None
            calibrate(checkpoint, plan, samples, record.calibration, device, calibrating, say)
        if ray is not None:
            make_shards_on_ray(ray, checkpoint, plan, record, missing, threads, progress)
        else:
            work = plan.calibrated(record.calibration)
            devices = devices or all_devices()
            make_shards(checkpoint, work, record, missing, devices, threads, progress)
        report = collect(checkpoint, plan, record)
        files = {REPORT_DATA: dumps(report).encode(), REPORT: render(report).encode()}
        finish(checkpoint, plan, record, others, files)
    except BaseException:
        record.abandon()
        raise
    return summary(missing)


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise QuantizeError(
            f"{target}: {needed / 1e9:.1f} GB are still to be written, but its disk has "
            f"{free / 1e9:.1f} GB free; free some space or choose another folder"
        )


def _source_bytes(plan: Plan, shards: Iterable[int]) -> int:
    return sum(job.nbytes for shard in shards for job in plan.shards[shard])
