"""How fast a run will go, by doing some of its jobs without writing what they make."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.run.jobs import Job
from quantize.run.shards import ShardWriter
from quantize.run.worker import Worker
from quantize.run.workers import team_of, threads_of_our_own

SECONDS = 3.0
"""After which no further job is begun."""

clock: Callable[[], float] = time.perf_counter


class Pace(NamedTuple):
    """How fast some jobs are done.

    Attributes:
        speed: bytes of the source a second, read and computed.
        threads: that do them.
        memory: bytes that these need at most.
    """

    speed: float
    threads: int
    memory: int


def pace(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    devices: Sequence[torch.device],
    threads: int | None = None,
) -> Pace:
    """Do some of ``jobs``, chosen at random, for :data:`SECONDS`.

    Args:
        devices, threads: see ``quantize.run.workers.make_shards``.

    Raises:
        QuantizeError: if a weight of theirs is damaged, or cannot be read.
    """
    team = team_of(checkpoint, jobs, devices, threads)
    order = random.Random(0).sample(range(len(jobs)), len(jobs))
    numbers = iter(order)
    writer = _Nowhere()
    with threads_of_our_own(), ThreadPoolExecutor(len(team), "pace") as pool:
        # The first job also compiles and allocates what all of them use.
        _do(jobs[order[0]], team[0], writer)
        started = clock()

        def work(worker: Worker) -> int:
            done = 0
            for number in numbers:
                done += _do(jobs[number], worker, writer)
                if clock() - started > SECONDS:
                    break
            return done

        done = sum(pool.map(work, team))
        speed = done / max(clock() - started, 1e-9)
    return Pace(speed, len(team), len(team) * max(job.memory for job in jobs))


def _do(job: Job, worker: Worker, writer: ShardWriter) -> int:
    with worker.at_work():
        worker.arena.reset()
        job.run(worker, writer)
        if worker.device.type == "cuda":
            torch.cuda.current_stream(worker.device).synchronize()
    return job.nbytes


class _Nowhere(ShardWriter):
    """Takes what is written, and keeps nothing of it."""

    def __init__(self) -> None:
        pass

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """See ``ShardWriter``."""

    def there(self, name: str) -> None:
        """See ``ShardWriter``."""
