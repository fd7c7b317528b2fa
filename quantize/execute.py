"""A run: plan, calibrate, shards, finish. The one place that knows all rooms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.filesize import decimal

from quantize.calibration.budget import needed
from quantize.calibration.calibrate import (
    calibrate,
    count_tokens,
    prove_walk,
    runnable_model,
    unstaged,
)
from quantize.calibration.cluster_crew import on_cluster
from quantize.calibration.crew import Crew, Round, on_devices
from quantize.calibration.estimate import Estimate, check, check_memory, estimate
from quantize.calibration.progress import Progress as Calibrating
from quantize.calibration.step_times import by_time
from quantize.checkpoint.companions import companions, left_out
from quantize.checkpoint.disk import out_of_space
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.native import environment
from quantize.report import dumps, render
from quantize.report.collect import collect
from quantize.run import done
from quantize.run.apart import check_apart
from quantize.run.cluster import make_shards_on_ray, room_on_ray
from quantize.run.counted import Counted
from quantize.run.finish import digests, finish, is_finished
from quantize.run.lock import locked
from quantize.run.new_record import is_unseen, new_record
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.run.sessions import Sessions
from quantize.run.space import Space
from quantize.run.stream import Stream, bytes_beside, streamed
from quantize.run.target import check_folder
from quantize.run.workers import Progress, all_devices, make_shards, not_shown

Say = Callable[[str], None]
"""Is told, in one line, what a user should know though nothing is wrong."""


Dry = Callable[["Run", Space | None], None]
"""Is told a run that is not carried out, and what it would write; None: it is complete already."""


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        seconds: all of it.
        bytes_read: of the source; a resumed run reads only what was missing.
        reading: of ``seconds``, those in which they were read, quantized and written; not those of
            a calibration.
    """

    seconds: float
    bytes_read: int
    reading: float
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
    progress: Progress = not_shown,
    samples: torch.Tensor | None = None,
    calibrating: Calibrating = lambda *_: None,
    counting: Calibrating | None = None,
    limited: bool | None = None,
    work_dir: Path | None = None,
    say: Say = lambda _: None,
    dry: Dry | None = None,
) -> Summary:
    """Carry out ``plan`` into the folder ``target``.

    Whatever can refuse a run does so before it changes anything. A checkpoint that is replaced
    stays until the new one is there, if its disk has room for both.

    Args:
        overwrite: replace a checkpoint, or an interrupted run, in ``target``.
        resume: go on with an interrupted run; start one if ``target`` is empty; do nothing if it
            is complete.
        devices: what computes; by default :func:`all_devices`. If there are GPUs among them, these.
            Calibration runs the model on the first, and rounds experts on all.
        threads: how many, on CPUs; by default as many as cores, within ``MEMORY``.
        ray: address of a Ray cluster that makes the shards instead of this machine.
        command: how the run was started, for the report.
        samples: tokens to calibrate with, int64 ``[num_samples, sequence_length]``, if the plan
            says so.
        calibrating: see ``quantize.calibration.progress.Progress``.
        counting: likewise, while the tokens that each expert gets are counted before any is rounded
            (``quantize.calibration.calibrate.count_tokens``); None: they are not.
        limited: say how long calibration will take, before anything is changed; and refuse it if
            that is too long, or it needs more memory than there is. False: say it alone; None:
            neither.
        work_dir: where calibration keeps hidden states and its experts; by default in ``target``.
        say: is told what is not copied, what becomes of a checkpoint that is replaced, and what the
            calibration's proof found.
        dry: do nothing but what can refuse the run, and tell this.

    Raises:
        QuantizeError: if ``target`` is the source, or holds files and neither flag is set; if
            another run is at work there; if it takes too much (``limited``); if a weight is NaN or
            infinite; if there is not enough space, or a file cannot be read or written. Then
            ``target`` holds the old checkpoint, or no ``config.json`` and a run that can be
            resumed.
    """
    started = time.perf_counter()
    environment.cpp()  # refuses what it cannot mean
    check_apart(checkpoint, target)
    others = companions(checkpoint.folder)
    check_apart(checkpoint, target, others)
    record = new_record(
        checkpoint, plan, target, others, resume=resume, command=command, work_dir=work_dir
    )

    def summary(missing: Sequence[int], reading: float = 0.0) -> Summary:
        return Summary(
            time.perf_counter() - started,
            _source_bytes(plan, missing),
            reading,
            checkpoint.nbytes,
            plan.nbytes,
            len(plan.shards),
        )

    def nothing_to_do() -> Summary:
        progress(_source_bytes(plan, range(len(plan.shards))))
        return summary([])

    check_folder(target)
    finished = resume and is_finished(record, plan, others, is_unseen(checkpoint))
    if finished and dry is None:
        if record.folder.exists():  # a kill in the last moments may have left it
            with locked(record.folder):
                record.end()
        return nothing_to_do()
    if dry is None and is_unseen(checkpoint):
        raise AssertionError(f"{checkpoint.folder}: its weights are still on the hub")
    run = Run(
        checkpoint,
        plan,
        record,
        others,
        _gpus_or_all(devices or all_devices()),
        threads,
        ray,
        samples,
        say,
        counting,
        limited,
        started,
    )
    if dry is not None:
        if not finished:
            record.prepare(overwrite, resume)
        dry(run, None if finished else run.check())
        return summary([])
    with locked(record.folder):
        # A run that was at work until now may have made it.
        if resume and not record.lasts and is_finished(record, plan, others):
            record.end()
            return nothing_to_do()
        return summary(run.go(overwrite, resume, progress, calibrating), run.reading)


def _gpus_or_all(devices: Sequence[torch.device]) -> Sequence[torch.device]:
    """The GPUs; all, if there are none."""
    return [device for device in devices if device.type == "cuda"] or devices


@dataclass
class Run:
    """A run. What it changes, it does while its target is locked.

    Attributes:
        missing: the shards that are still to be made, once that is known (:meth:`check`).
        estimate: what calibrating will take, likewise; None if nothing is calibrated, or nobody
            asked.
        reading: seconds that shards have taken.
    """

    checkpoint: Checkpoint
    plan: Plan
    record: Record
    others: list[str]
    devices: Sequence[torch.device]
    threads: int | None
    ray: str | None
    samples: torch.Tensor | None
    say: Say
    counting: Calibrating | None
    limited: bool | None
    started: float
    cluster: int = 0
    """How many tasks the Ray cluster has room for."""
    missing: Sequence[int] = ()
    estimate: Estimate | None = None
    reading: float = 0.0

    def go(
        self,
        overwrite: bool,
        resume: bool,
        progress: Progress,
        calibrating: Calibrating,
    ) -> list[int]:
        """All of it; returns the shards that were made."""
        record, plan, checkpoint = self.record, self.plan, self.checkpoint
        record.prepare(overwrite, resume)
        space = self.check()
        record.begin(overwrite, resume)
        self.sessions = Sessions(
            record.folder, self.devices, time.perf_counter() - self.started, self.cluster
        )
        try:
            done.discard_changed(record, checkpoint, plan)
            missing = done.missing(record, plan)
            counted = Counted(progress)
            counted.begin_at(_source_bytes_without(plan, missing))
            self._say_what_stays()
            try:
                self._make(missing, space, counted, calibrating)
            except (QuantizeError, OSError) as error:
                # Others write to the disk too, and quotas are not known before.
                if record.cleared or not out_of_space(error):
                    raise
                self._clear()
                left = done.missing(record, plan)
                counted.begin_at(_source_bytes_without(plan, left))
                self._make(left, space, counted, calibrating)
        except BaseException as error:
            record.abandon(error)
            raise
        return missing

    def check(self) -> Space:
        """Whatever else can refuse the run, whose record is prepared. Nothing is changed.

        Raises:
            QuantizeError: if something does.
        """
        record, plan = self.record, self.plan
        if self.ray is not None:
            self.cluster = room_on_ray(self.ray, self.threads)
        every = range(len(plan.shards))
        missing: Sequence[int] = every
        voided = []
        if record.goes_on:
            voided = done.voided(record, self.checkpoint, plan)
            missing = [i for i in every if i in voided or not done.is_done(record, plan, i)]
        self.missing = missing
        shards = sum(out.nbytes for i in missing for out in plan.outputs(i))
        shards += sum((self.checkpoint.folder / name).stat().st_size for name in self.others)
        calibration = 0
        if plan.options.calibration and missing:
            fresh = not record.goes_on or bool(voided)
            if fresh or unstaged(plan, done.staged_of(record, plan)):
                budget = needed(self.checkpoint, plan, self.devices[0])
                calibration = budget.states
                if not fresh:  # an earlier run may have left a part of it
                    files = record.calibration.rglob("*")
                    calibration -= sum(f.stat().st_size for f in files if f.is_file())
                if self.checkpoint.weights.here:  # else it is a dry run of a model on the hub
                    runnable_model(self.checkpoint, plan, self.devices[0])
                left = plan.groups if fresh else unstaged(plan, done.staged_of(record, plan))
                self._foresee(budget.memory, left)
        if record.goes_on and not voided:
            shards -= sum(_allocated(record.rounded(name)) for name in plan.file_names)
        source = bytes_beside(self.checkpoint, plan, record, missing)
        space = Space(record, max(0, shards), max(0, calibration), plan.rounds, source)
        space.check()
        return space

    def _foresee(self, memory: int, groups: list[ExpertGroup]) -> None:
        """Say how long calibrating some experts will take, and refuse what is too much."""
        if self.limited is None:
            return
        device = self.devices[0]
        if self.limited:
            check_memory(memory, device)
        if not self.checkpoint.weights.here:
            return
        counting = self.counting is not None
        count = self.cluster or len(self.devices)
        found = estimate(self.checkpoint, self.plan, groups, device, counting, count)
        if self.limited:
            check(found)
        self.estimate = found
        self.say(f"Calibration: {found}")

    def _make(
        self,
        missing: Sequence[int],
        space: Space,
        progress: Progress,
        calibrating: Calibrating,
    ) -> None:
        """Calibrate, make the missing shards, and finish."""
        record, plan, checkpoint = self.record, self.plan, self.checkpoint
        if plan.options.calibration and missing:
            assert self.samples is not None
            what = checkpoint, plan, self.samples, done.staged_of(record, plan), self.devices[0]
            with self.sessions.phase("proof"):
                prove_walk(*what, self.say)
            if not space.has_room_to_calibrate():
                self._clear()
            if self.counting is not None:
                with self.sessions.phase("counting tokens"):
                    count_tokens(*what, self.say, self.counting)
            with self.sessions.phase("calibration"):
                if self.estimate is not None:
                    calibrating = by_time(calibrating, self.estimate.steps)
                calibrate(*what, calibrating, self.say, self._gather)
        if not space.has_room_for_shards():
            self._clear()
        assert record.identity is not None
        begun = time.perf_counter()
        try:
            with self.sessions.phase("shards"):
                if streamed(checkpoint):
                    with Stream(checkpoint, plan, record, missing, self.say) as stream:
                        self._make_shards(missing, progress, stream)
                        record.identity = stream.identify(record.identity)
                else:
                    self._make_shards(missing, progress)
        finally:  # after a full disk it is tried again, and what was read counts
            self.reading += time.perf_counter() - begun
        edited = digests(checkpoint, plan, record.identity)
        report = collect(checkpoint, plan, record, edited, self.sessions.all)
        files = {REPORT_DATA: dumps(report).encode(), REPORT: render(report).encode()}
        finish(checkpoint, plan, record, self.others, files)

    def _make_shards(
        self, missing: Sequence[int], progress: Progress, stream: Stream | None = None
    ) -> None:
        what, threads = (self.checkpoint, self.plan, self.record), self.threads
        if self.ray is not None:
            make_shards_on_ray(self.ray, *what, missing, threads, progress)
            return
        checkpoint, plan, record = what
        work = plan.calibrated(done.staged_of(record, plan))
        make_shards(checkpoint, work, record, missing, self.devices, threads, progress, stream)

    def _gather(self, rounds: Round) -> AbstractContextManager[Crew | None]:
        """Who rounds experts: see ``quantize.calibration.calibrate.Gather``."""
        if self.ray is not None:
            what = self.checkpoint, self.plan, self.record, self.threads
            return on_cluster(self.ray, *what, self.say)
        if len(self.devices) == 1:
            return nullcontext()
        return on_devices(rounds, self.devices, self.say)

    def _say_what_stays(self) -> None:
        weights = [file.name for file in self.checkpoint.files]
        if names := left_out(self.checkpoint.folder, self.others, weights):
            self.say(f"not copied from SRC: {_some(names)}")
        replaced = self.record.replaced
        if replaced.aside:
            self.say(
                f"of what is in DST, {_some(replaced.aside)} will be in {replaced.folder}/: no run "
                "recorded them, and they must not be read with the new model"
            )

    def _clear(self) -> None:
        """Give up the old checkpoint before the new one is there."""
        freed = decimal(self.record.replaced.nbytes(self.record.target))
        self.say(
            f"{self.record.target}: its disk has no room for two checkpoints, so the old one "
            f"({freed}) is removed first"
        )
        self.record.clear()


def _allocated(file: Path) -> int:
    """Bytes of the disk that a file takes; 0 if it is not there."""
    try:
        return file.stat().st_blocks * 512
    except OSError:
        return 0


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _source_bytes_without(plan: Plan, missing: Sequence[int]) -> int:
    return _source_bytes(plan, set(range(len(plan.shards))) - set(missing))


def _source_bytes(plan: Plan, shards: Iterable[int]) -> int:
    return sum(job.nbytes for shard in shards for job in plan.shards[shard])
