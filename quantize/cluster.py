"""Past one machine: a run's shards as tasks of a Ray cluster, the engine's own way to scale.

Every machine reads the source and writes into the target itself, so both must be on storage that
all share, and every machine must have this package. A task is one shard. It can be repeated
anywhere at any time: it depends on nothing but the plan, and its output gets its name in one step.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantize.checkpoint import Checkpoint
from quantize.errors import QuantizeError
from quantize.gates import Gates
from quantize.pipeline import Progress, all_devices, make_shards
from quantize.plan import Options, Plan, plan
from quantize.record import Record

_RETRIES = 3
"""Times that a task is started again when its machine or process dies."""


def make_shards_on_ray(
    address: str,
    checkpoint: Checkpoint,
    plan: Plan,
    record: Record,
    shards: Sequence[int],
    threads: int | None,
    progress: Progress,
) -> None:
    """``quantize.pipeline.make_shards`` on the Ray cluster at ``address``.

    Args:
        threads: and CPUs of the cluster, for each task; by default one. Where the cluster has GPUs,
            each task takes one of them instead.

    Raises:
        QuantizeError: if Ray is not installed or not there, or a task fails.
    """
    try:
        import ray
    except ImportError:
        raise QuantizeError("--ray needs Ray: pip install 'ray>=2.40'") from None
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise QuantizeError(f"--ray {address}: no cluster there ({_first_line(error)})") from error
    try:
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        task = ray.remote(_make_shard).options(
            num_cpus=threads or 1,
            num_gpus=1 if gpus else 0,
            max_retries=_RETRIES,
            scheduling_strategy="SPREAD",
        )
        where = (str(checkpoint.folder.resolve()), str(record.target.resolve()))
        pending = {
            task.remote(*where, plan.options, plan.gates, record.fingerprint, shard, threads): shard
            for shard in shards
        }
        while pending:
            (done, *_), _ = ray.wait(list(pending))
            shard = pending.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise _ours(error.cause) from error
            except ray.exceptions.RayError as error:
                raise QuantizeError(f"--ray {address}: {_first_line(error)}") from error
            if not record.is_done(plan, shard):
                raise QuantizeError(
                    f"{record.target / plan.names[shard]} was written by another machine and is "
                    "not here; the target must be on storage that all machines share"
                )
            progress(sum(job.nbytes for job in plan.shards[shard]))
    finally:
        if ours:
            ray.shutdown()


def _make_shard(
    source: str,
    target: str,
    options: Options,
    gates: Gates,
    fingerprint: str,
    shard: int,
    threads: int | None,
) -> None:
    """The task: one shard, on whichever machine it runs."""
    checkpoint, steps = _planned(source, options, gates)
    if steps.fingerprint(checkpoint) != fingerprint:
        raise QuantizeError(
            f"{platform.node()} sees another source in {source}, or has another version of this "
            "package; both must be the same on all machines"
        )
    record = Record(Path(target), fingerprint)
    make_shards(checkpoint, steps, record, [shard], all_devices(), threads or 1)


@lru_cache(maxsize=1)
def _planned(source: str, options: Options, gates: Gates) -> tuple[Checkpoint, Plan]:
    """Once for all the shards that a process makes."""
    if not Path(source).is_dir():
        raise QuantizeError(
            f"{platform.node()} does not see {source}; source and target must be on storage that "
            "all machines share"
        )
    checkpoint = Checkpoint(Path(source))
    return checkpoint, plan(checkpoint, options, gates)


def _ours(cause: Any) -> QuantizeError:
    if isinstance(cause, QuantizeError):
        return cause
    return QuantizeError(f"a task failed: {type(cause).__name__}: {cause}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
