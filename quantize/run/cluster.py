"""Making shards on several machines: each shard is a task of a Ray cluster.

Every machine of the cluster needs this package, in the same version, and the storage that source
and target are on, at the same paths. It needs nothing else: a task plans for itself, reads the
source and writes one shard into the target. A task can be repeated anywhere at any time, because
it depends on the plan alone and its shard gets its name in one step.

The command is started on one of the machines (``--ray auto``, ``--ray HEAD:6379``), or on another
that has the storage too, through Ray's client server (``--ray ray://HEAD:10001``).
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.names import where_of
from quantize.run.done import is_done, staged_of
from quantize.run.plan import Plan, plan
from quantize.run.record import Record
from quantize.run.version import package_version
from quantize.run.workers import Progress, all_devices, make_shards

RETRIES = 3
"""Times that a task is started again when its machine or process dies."""

_CONNECT = 5.0
"""Seconds to wait for the cluster's head to answer; Ray itself would wait for minutes."""

_PATIENCE = 10.0
"""Seconds for tasks to stop."""

SETTLE = 60.0
"""Seconds until what one machine wrote can be seen on all: network file systems cache that long."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to the Ray cluster at ``address``, unless this process is connected already.

    Within the context, standard output goes to standard error, because Ray prints notices.

    Raises:
        QuantizeError: if Ray is not installed, or not there.
    """
    try:
        import grpc  # noqa: F401  (of Ray's client, for what follows)
        import ray
    except ImportError:
        raise QuantizeError("--ray needs Ray: pip install 'ray[client]>=2.40'") from None
    if ray.is_initialized():
        yield
        return
    _check_address(address)
    # Ray's own handler would end this process without tasks being stopped.
    handled = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise QuantizeError(f"--ray {address}: no cluster there ({brief(error)})") from error
    finally:
        if handled is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handled)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        ray.shutdown()


def make_shards_on_ray(
    address: str,
    checkpoint: Checkpoint,
    plan: Plan,
    record: Record,
    shards: Sequence[int],
    threads: int | None,
    progress: Progress,
) -> None:
    """``quantize.run.workers.make_shards`` on the Ray cluster at ``address``.

    Args:
        threads: and CPUs of the cluster, for each task; by default one. Where the cluster has GPUs,
            each task takes one of them instead.

    Raises:
        QuantizeError: if Ray is not installed or not there, or a task fails.
    """
    with connected(address):
        import ray

        task = ray.remote(_make_shard).options(
            **resources(threads), max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        run = run_of(checkpoint, plan, record, threads)
        # Of this driver: one that goes on with the run must not stop its tasks by the same.
        stop = record.folder / f"{uuid4().hex}.stop"
        progress(0)
        pending = {task.remote(run, stop.name, shard): shard for shard in shards}
        try:
            while pending:
                (done, *_), _ = ray.wait(list(pending))
                shard = pending.pop(done)
                try:
                    ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise ours(error.cause) from error
                except ray.exceptions.RayError as error:
                    raise QuantizeError(f"--ray {address}: {brief(error)}") from error
                _wait_for(shard, plan, record)
                nbytes = sum(job.nbytes for job in plan.shards[shard])
                progress(nbytes, where_of(plan.outputs(shard)[-1].name))
        except BaseException:
            _end(list(pending), stop)
            raise


def run_of(checkpoint: Checkpoint, plan: Plan, record: Record, threads: int | None) -> bytes:
    """What a task must know of a run: :func:`opened` takes it."""
    where = str(checkpoint.folder.resolve()), str(record.target.resolve())
    staged = str(record.calibration.resolve()) if plan.options.calibration else ""
    return pickle.dumps(
        (
            *where,
            staged,
            plan.options,
            plan.gates,
            record.fingerprint,
            record.cleared,
            threads or 1,
        )
    )


def _end(tasks: list[Any], stop: Path) -> None:
    """Stop all tasks, so that none writes into the target after the caller has failed.

    They end by themselves when they see the file ``stop``. Ray kills what does not; only that,
    since a driver of Ray 2.60 can crash when a task that it kills ends at the same moment.
    """
    import ray

    try:
        with suppress(OSError):
            stop.touch()
        _, hanging = ray.wait(tasks, num_returns=len(tasks), timeout=_PATIENCE)
        for one in hanging:
            ray.cancel(one, force=True)
        ray.wait(hanging, num_returns=len(hanging), timeout=_PATIENCE)
    finally:
        with suppress(OSError):
            stop.unlink(missing_ok=True)


def _check_address(address: str) -> None:
    """Ask the head's port before Ray does, which would try, and complain, for minutes."""
    scheme, found, rest = address.rpartition("://")
    if address == "auto" or (found and scheme != "ray"):
        return
    import grpc

    host, _, port = rest.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise QuantizeError(
            f"--ray {address} is neither auto, nor HOST:PORT, nor ray://HOST:PORT of a cluster"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT):
            pass
    except OSError as error:
        raise QuantizeError(
            f"--ray {address}: no cluster there ({error.strerror or error})"
        ) from error
    if "RAY_USE_TLS" in os.environ:  # then only Ray knows with which certificates
        return
    # A proxy is for the web: Ray does not use it either.
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"{host}:{port}", options) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT)
        except grpc.FutureTimeoutError:
            raise QuantizeError(
                f"--ray {address}: no cluster there (something else than Ray answers; its own port "
                "is 6379 unless it was started with another, that of its client server 10001)"
            ) from None


def room_on_ray(address: str, threads: int | None) -> int:
    """How many tasks the cluster at ``address`` does at once.

    Raises:
        QuantizeError: if no machine of it has so many CPUs, or it is not there.
    """
    with connected(address):
        return slots(threads)


def slots(threads: int | None) -> int:
    """How many tasks the cluster does at once, as it is now."""
    import ray

    each = resources(threads)
    if each["num_gpus"]:
        return int(ray.cluster_resources()["GPU"])
    cpus = (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    return max(1, sum(int(count // each["num_cpus"]) for count in cpus))


def resources(threads: int | None) -> dict[str, int]:
    """What each task takes of the cluster."""
    import ray

    if ray.cluster_resources().get("GPU", 0) > 0:
        return {"num_cpus": 1, "num_gpus": 1}
    most = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    # Without any CPUs now, an autoscaler may bring some.
    if threads and 0 < most < threads:
        raise QuantizeError(
            f"--threads {threads}: no machine of the Ray cluster has more than {most:.0f} CPUs"
        )
    return {"num_cpus": threads or 1, "num_gpus": 0}


def _wait_for(shard: int, plan: Plan, record: Record) -> None:
    """Until a shard that another machine wrote can be seen on this one."""
    deadline = time.monotonic() + SETTLE
    while not is_done(record, plan, shard):
        if time.monotonic() > deadline:
            raise QuantizeError(
                f"{record.place(plan.file_names[shard])} was written by another machine and is "
                "not here; the target must be on storage that all machines share"
            )
        time.sleep(0.5)


def _make_shard(run: bytes, stop: str, shard: int) -> None:
    """The task: one shard, on whichever machine it runs, unless the driver says to stop."""
    checkpoint, steps, record, threads = _planned(run)

    def go_on(*_: object) -> None:
        if (record.folder / stop).exists():
            raise QuantizeError("stopped by the driver")

    go_on()
    if is_done(record, steps, shard):
        return  # by a task that was taken for dead
    make_shards(checkpoint, steps, record, [shard], all_devices(), threads, go_on)


@lru_cache(maxsize=1)
def _planned(run: bytes) -> tuple[Checkpoint, Plan, Record, int]:
    """Once for all the shards that a process makes."""
    checkpoint, steps, record, staged, threads = opened(run)
    return checkpoint, steps.calibrated(staged_of(record, steps, staged)), record, threads


def opened(run: bytes) -> tuple[Checkpoint, Plan, Record, Path, int]:
    """What a task works with, on the machine that it is on: of :func:`run_of`.

    Returns:
        source, plan, record, the folder of what calibration keeps, and how many threads to take.

    Raises:
        QuantizeError: if this machine does not see the same source and target as the driver.
    """
    source, target, staged, options, gates, fingerprint, cleared, threads = pickle.loads(run)
    for folder in (source, target, *([staged] if staged else [])):
        if not Path(folder).is_dir():
            raise QuantizeError(
                f"{platform.node()} does not see {folder}; source and target must be on storage "
                "that all machines share, and so must --work-dir"
            )
    checkpoint = Checkpoint(Path(source))
    steps = plan(checkpoint, options, gates)
    if steps.fingerprint(checkpoint) != fingerprint:
        raise QuantizeError(
            f"{platform.node()} sees another source in {source}, or has another version of this "
            "package; both must be the same on all machines"
        )
    record = Record(Path(target), fingerprint)
    record.cleared = cleared
    return checkpoint, steps, record, Path(staged), threads


def ours(cause: Any) -> QuantizeError:
    """What to tell a user of a task's error."""
    if isinstance(cause, QuantizeError):
        return cause
    if "failed to import on the worker" in str(cause):
        return QuantizeError(
            "a machine of the Ray cluster cannot import this package; install it on all of them, "
            f"in the same version ({package_version()})"
        )
    return QuantizeError(f"a task failed: {type(cause).__name__}: {brief(cause)}")


def brief(error: Any) -> str:
    """One line of a message that may hold a whole traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]} {lines[-1]}" if len(lines) > 1 and lines[0].endswith(":") else lines[0]
