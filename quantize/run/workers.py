"""Making shards on threads: each reads, quantizes and writes, one job after another.

While one thread computes, the system reads ahead what another will need and writes what a third
has made. So reading, computing and writing overlap without queues between them, and the memory in
use is that of one job for each thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from itertools import zip_longest
from threading import Lock
from typing import Protocol

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.streamed import StoppedError
from quantize.errors import QuantizeError
from quantize.experts.names import where_of
from quantize.run.jobs import Job, KeepRounded
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.shards import ShardWriter, is_complete
from quantize.run.stream import Stream
from quantize.run.weight_error import WeightError
from quantize.run.worker import Worker

MEMORY = 384 * 2**20
"""Bytes that the jobs of all CPU threads may need together. One thread always runs."""

PER_GPU = 8
"""Threads for each GPU: while it computes for one of them, the others read, copy and write."""

_AT_ONCE = 4
"""Shards that are written at the same time, at most: their work is lost if the run is killed."""


class Progress(Protocol):
    """Is told how many bytes of the source have just been done, and of which layer and expert."""

    def __call__(self, nbytes: int, where: str = "", /) -> None: ...


def not_shown(*_: object) -> None:
    """Progress that nobody sees."""


def make_shards(
    checkpoint: Checkpoint,
    plan: Plan,
    record: Record,
    shards: Sequence[int],
    devices: Sequence[torch.device],
    threads: int | None = None,
    progress: Progress = not_shown,
    stream: Stream | None = None,
) -> None:
    """Make some of the plan's shards, and record what quantizing their weights lost.

    Args:
        shards: numbers of the shards, indices of ``plan.shards``.
        devices: every GPU among them gets ``PER_GPU`` threads; without one, the CPU computes.
        threads: how many CPU threads; by default one a core, as far as ``MEMORY`` allows.
        progress: called with the bytes of the source that a job has read; with 0 as they begin.
        stream: what brings the source's files, if they are on the hub.

    Raises:
        QuantizeError: if a tensor cannot be read, quantized or written, or another run has taken
            the target over. Unfinished shards are removed then.
    """
    if not shards:
        return
    wanted = [job for i in shards for job in plan.shards[i]]
    team = team_of(checkpoint, wanted, devices, threads)
    jobs = list(_interleaved(plan, shards, 1 if stream else len(team)))
    open_shards = _OpenShards(plan, record, stream)
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
                if ahead < len(jobs):
                    jobs[ahead][1].will_need(checkpoint)
                worker.arena.reset()
                if stream:
                    stream.await_turn(shard)
                errors = job.run(worker, open_shards.writer(shard))
                open_shards.done(shard, errors)
                progress(job.nbytes, where_of(job.outputs[0].name))

    def guarded(worker: Worker) -> None:
        try:
            work(worker)
        except BaseException:
            stop()
            raise

    def stop() -> None:
        failed.append(True)  # the others stop after their job
        if stream:
            stream.stop()

    progress(0)
    try:
        with threads_of_our_own(), ThreadPoolExecutor(len(team), "quantize") as pool:
            try:
                stopped = None
                for future in as_completed([pool.submit(guarded, worker) for worker in team]):
                    try:
                        future.result()
                    except StoppedError as error:
                        stopped = error  # another error is why
            except BaseException:
                stop()
                raise
        open_shards.wait()
        if stopped is not None:
            raise stopped
    finally:
        open_shards.close()


def all_devices() -> list[torch.device]:
    """All GPUs of this machine, or its CPU if it has none."""
    if torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu")]


def _interleaved(plan: Plan, shards: Sequence[int], count: int) -> Iterator[tuple[int, Job]]:
    """All jobs, taken in turn from up to ``count`` shards: a file takes one write at a time."""
    count = min(count, _AT_ONCE)
    for first in range(0, len(shards), count):
        jobs = zip_longest(
            *([(i, job) for job in plan.shards[i]] for i in shards[first : first + count])
        )
        yield from (job for some in jobs for job in some if job is not None)


class _OpenShards:
    """The shards that threads are writing. Each is finished when its last job is done."""

    def __init__(self, plan: Plan, record: Record, stream: Stream | None) -> None:
        self._plan = plan
        self._record = record
        self._stream = stream
        self._writers: dict[int, ShardWriter] = {}
        self._errors: dict[int, list[WeightError]] = {}
        self._left = {i: len(jobs) for i, jobs in enumerate(plan.shards)}
        self._lock = Lock()
        # Bringing a shard to the disk takes a while; the threads go on with the next meanwhile.
        self._finisher = ThreadPoolExecutor(1, "finish")
        self._finishing: list[Future[None]] = []

    def writer(self, shard: int) -> ShardWriter:
        """The writer of a shard, which the first call opens."""
        with self._lock:
            if shard not in self._writers:
                name = self._plan.file_names[shard]
                outputs, partial = self._plan.outputs(shard), self._record.partial(name)
                kept = any(isinstance(job, KeepRounded) for job in self._plan.shards[shard])
                if kept:
                    partial = self._record.rounded(name)
                    if not is_complete(partial, outputs):
                        raise QuantizeError(
                            f"{partial}: what calibration has rounded is gone; run the same "
                            "command with --resume"
                        )
                place = self._record.place(name)
                self._writers[shard] = ShardWriter(place, outputs, partial, kept)
                self._errors[shard] = []
            return self._writers[shard]

    def done(self, shard: int, errors: list[WeightError]) -> None:
        """Note that a job of the shard is done, and what its weights lost."""
        with self._lock:
            self._errors[shard] += errors
            self._left[shard] -= 1
            if not self._left[shard]:
                writer, every = self._writers.pop(shard), self._errors.pop(shard)
                self._finishing.append(self._finisher.submit(self._finish, shard, writer, every))
            finished = [future for future in self._finishing if future.done()]
            self._finishing = [future for future in self._finishing if future not in finished]
        for future in finished:
            future.result()  # a full disk may show only here: no use in going on

    def wait(self) -> None:
        """Wait until all shards are finished; raises what went wrong."""
        for future in self._finishing:
            future.result()

    def close(self) -> None:
        """Remove unfinished shards."""
        self._finisher.shutdown()
        for writer in self._writers.values():
            with suppress(OSError):
                writer.abort()

    def _finish(self, shard: int, writer: ShardWriter, errors: list[WeightError]) -> None:
        try:
            try:
                self._record.check_ours()
                self._record.save_errors(writer.path.name, errors)
            except BaseException:
                writer.abort()
                raise
            writer.finish()
        except BaseException:
            if self._stream:
                self._stream.stop()  # the next shards wait for this one
            raise
        if self._stream:
            self._stream.finished(shard)


def team_of(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    devices: Sequence[torch.device],
    threads: int | None,
) -> list[Worker]:
    """Those who do ``jobs``, as :func:`make_shards` is asked to."""
    largest = max(job.memory for job in jobs)
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus:
        return [Worker(checkpoint, device, largest) for _ in range(PER_GPU) for device in gpus]
    if threads is None:
        threads = min(cores(largest), len(jobs))
    return [Worker(checkpoint, devices[0]) for _ in range(threads)]


@contextmanager
def threads_of_our_own() -> Iterator[None]:
    """Keep PyTorch from starting threads of its own, which would compete with ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores(memory: int) -> int:
    """How many threads to run if each needs ``memory`` bytes: one a core, within ``MEMORY``."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    return max(1, min(count, MEMORY // max(1, memory)))
