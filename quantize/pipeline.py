"""Carrying out a plan: threads that read, quantize and write, each one job after another.

While one thread computes, another's data is read ahead by the system and a third's is written, so
the three overlap without queues between them. Memory is a job's, times the threads.
``config.json`` comes last: until it is there, no engine takes the folder for a checkpoint.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from threading import Lock

import torch

from quantize.calibration.budget import needed
from quantize.calibration.run import calibrate
from quantize.calibration.run import missing as unstaged
from quantize.calibration.staged import Staged
from quantize.checkpoint import INDEX, Checkpoint
from quantize.errors import QuantizeError
from quantize.gates import KEY, to_contract
from quantize.jobs import Job, QuantizeExpert, WeightError, Worker
from quantize.plan import Plan
from quantize.record import REPORT, Record
from quantize.report import render
from quantize.results import collect
from quantize.shards import ShardWriter, replacing, sync, write_json

MEMORY = 384 * 2**20
"""Bytes that the threads' jobs may need together, if not one of them alone needs more."""

PER_GPU = 8
"""Threads a GPU: while it computes for one, others read, copy and write."""

_AT_ONCE = 4
"""Shards written at the same time, at most: what a kill can undo."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
_REWRITTEN = {"config.json", "hf_quant_config.json", INDEX}

Progress = Callable[[int], None]
"""Told how many bytes of the source have just been done."""


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
    rows: torch.Tensor | None = None,
    calibrating: Callable[[float, int], None] = lambda _, __: None,
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
        rows: tokens to calibrate with, int64 ``[rows, length]``, if the plan says so.
        calibrating: see ``quantize.calibration.run.Progress``.

    Raises:
        QuantizeError: if ``target`` is the source, or holds files and neither flag is set; if a
            weight is NaN or infinite; if there is not enough space, or a file cannot be read or
            written. Then ``target`` holds no ``config.json``, and a run can be resumed.
    """
    started = time.perf_counter()
    # The files' own folders too: a source may be a folder of links to them.
    sources = {checkpoint.folder, *(file.resolve().parent for file in checkpoint.files)}
    if target.exists() and any(folder.samefile(target) for folder in sources):
        raise QuantizeError(f"{target} is the source; choose another folder")
    others = list(_other_files(checkpoint.folder))
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
            assert rows is not None
            calibrate(checkpoint, plan, rows, record.calibration, device, calibrating)
        if ray is not None:
            from quantize.cluster import make_shards_on_ray

            make_shards_on_ray(ray, checkpoint, plan, record, missing, threads, progress)
        else:
            make_shards(
                checkpoint, plan, record, missing, devices or all_devices(), threads, progress
            )
        _finish(checkpoint, plan, record, others)
    except BaseException:
        record.abandon()
        raise
    return summary(missing)


def make_shards(
    checkpoint: Checkpoint,
    plan: Plan,
    record: Record,
    shards: Sequence[int],
    devices: Sequence[torch.device],
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Write some of the plan's shards, and to ``record`` what their weights lost."""
    if not shards:
        return
    staged = Staged(record.calibration) if plan.options.calibration else None
    wanted = [job for i in shards for job in plan.shards[i]]
    team = _team(checkpoint, wanted, devices, threads, staged)
    jobs = list(_interleaved(plan, shards, len(team)))
    open_shards = _OpenShards(plan, record)
    numbers = iter(range(len(jobs)))
    failed: list[bool] = []
    lock = Lock()

    def work(worker: Worker) -> None:
        with worker.at_work():
            while not failed:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                shard, job = jobs[number]
                ahead = number + len(team)
                if ahead < len(jobs) and not (
                    staged and isinstance(jobs[ahead][1], QuantizeExpert)
                ):
                    jobs[ahead][1].will_need(checkpoint)
                worker.arena.reset()
                errors = job.run(worker, open_shards.writer(shard))
                open_shards.done(shard, errors)
                progress(job.nbytes)

    def guarded(worker: Worker) -> None:
        try:
            work(worker)
        except BaseException:
            failed.append(True)  # the others stop after their job
            raise

    try:
        with threads_of_our_own(), ThreadPoolExecutor(len(team), "quantize") as pool:
            try:
                for future in as_completed([pool.submit(guarded, worker) for worker in team]):
                    future.result()
            except BaseException:
                failed.append(True)
                raise
        open_shards.wait()
    finally:
        open_shards.close()


def all_devices() -> list[torch.device]:
    """Every GPU of this machine; its CPU if it has none."""
    if torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu")]


def _interleaved(plan: Plan, shards: Sequence[int], count: int) -> Iterator[tuple[int, Job]]:
    """All jobs, in turn from up to ``count`` shards: a file takes one write at a time."""
    count = min(count, _AT_ONCE)
    for first in range(0, len(shards), count):
        rows = zip_longest(
            *([(i, job) for job in plan.shards[i]] for i in shards[first : first + count])
        )
        yield from (job for row in rows for job in row if job is not None)


class _OpenShards:
    """The shards that threads are writing; each is finished once its last job is done."""

    def __init__(self, plan: Plan, record: Record) -> None:
        self._plan = plan
        self._record = record
        self._writers: dict[int, ShardWriter] = {}
        self._errors: dict[int, list[WeightError]] = {}
        self._left = {i: len(jobs) for i, jobs in enumerate(plan.shards)}
        self._lock = Lock()
        # Bringing a shard to the disk takes a while; the threads go on with the next meanwhile.
        self._finisher = ThreadPoolExecutor(1, "finish")
        self._finishing: list[Future[None]] = []

    def writer(self, shard: int) -> ShardWriter:
        """The shard's writer."""
        with self._lock:
            if shard not in self._writers:
                name = self._plan.names[shard]
                self._writers[shard] = ShardWriter(
                    self._record.target / name,
                    self._plan.outputs(shard),
                    self._record.partial(name),
                )
                self._errors[shard] = []
            return self._writers[shard]

    def done(self, shard: int, errors: list[WeightError]) -> None:
        """A job of the shard is done."""
        with self._lock:
            self._errors[shard] += errors
            self._left[shard] -= 1
            if not self._left[shard]:
                writer, every = self._writers.pop(shard), self._errors.pop(shard)
                self._finishing.append(self._finisher.submit(self._finish, writer, every))
            finished = [future for future in self._finishing if future.done()]
            self._finishing = [future for future in self._finishing if future not in finished]
        for future in finished:
            future.result()  # a full disk may show only here: no use in going on

    def wait(self) -> None:
        """Until all shards are finished; raises what went wrong."""
        for future in self._finishing:
            future.result()

    def close(self) -> None:
        """Remove what is unfinished."""
        self._finisher.shutdown()
        for writer in self._writers.values():
            with suppress(OSError):
                writer.abort()

    def _finish(self, writer: ShardWriter, errors: list[WeightError]) -> None:
        try:
            self._record.check_ours()
            self._record.save_errors(writer.path.name, errors)
        except BaseException:
            writer.abort()
            raise
        writer.finish()


def _team(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    devices: Sequence[torch.device],
    threads: int | None,
    staged: Staged | None,
) -> list[Worker]:
    largest = max(job.memory for job in jobs)
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus:
        return [
            Worker(checkpoint, device, largest, staged) for _ in range(PER_GPU) for device in gpus
        ]
    if threads is None:
        threads = min(cores(largest), len(jobs))
    return [Worker(checkpoint, devices[0], staged=staged) for _ in range(threads)]


@contextmanager
def threads_of_our_own() -> Iterator[None]:
    """PyTorch's own threads would compete with ours; what it does beside them is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores(memory: int) -> int:
    """How many threads to run whose jobs need ``memory`` bytes each: all cores, within MEMORY."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    return max(1, min(count, MEMORY // max(1, memory)))


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise QuantizeError(
            f"{target}: {needed / 1e9:.1f} GB are still to be written, but its disk has "
            f"{free / 1e9:.1f} GB free; free some space or choose another folder"
        )


def _source_bytes(plan: Plan, shards: Iterable[int]) -> int:
    return sum(job.nbytes for shard in shards for job in plan.shards[shard])


def _finish(checkpoint: Checkpoint, plan: Plan, record: Record, others: Sequence[Path]) -> None:
    record.check_ours()
    target, partial = record.target, record.partial("other")
    for file in others:
        try:
            with file.open("rb") as copied, replacing(target / file.name, partial) as copy:
                shutil.copyfileobj(copied, copy)
        except OSError as error:
            raise QuantizeError(
                f"{file} cannot be copied to {target}: {error.strerror or error}"
            ) from error
    for name, value in plan.layout.extra_files(plan.ignore).items():
        write_json(target / name, value, partial)
    report = render(collect(checkpoint, plan, record)) + record.mark
    with replacing(target / REPORT, partial) as page:
        page.write(report.encode())
    if len(plan.shards) > 1:
        weight_map = {
            out.name: name for i, name in enumerate(plan.names) for out in plan.outputs(i)
        }
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(target / INDEX, index, partial)
    config = checkpoint.config | {
        KEY: to_contract(plan.gates.concatenated()),
        "quantization_config": plan.layout.quantization_config(plan.ignore),
    }
    sync(target)  # all names but the last
    write_json(target / "config.json", config, partial)
    sync(target)
    record.end()


def _other_files(folder: Path) -> Iterator[Path]:
    """What is copied beside the weights: tokenizer, generation settings, licence and so on."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS or file.name.endswith(".index.json"):
            continue
        if file.is_symlink() and not file.exists():
            raise QuantizeError(f"{file}: the link leads nowhere; download the checkpoint again")
        if file.is_file() and file.name not in _REWRITTEN:
            yield file
