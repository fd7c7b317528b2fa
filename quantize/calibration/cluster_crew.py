"""A Ray cluster as a crew: each batch of experts is a task, on whichever machine has room for it.

A task is told names alone. It reads an expert's weights from the source, and what the experts of
the layer are given from the files of hidden states, both on storage that all machines share; it
sends back codes and scales, which the driver writes. What that takes of network and storage is
reckoned in docs/contributors/rounding-on-gpus.md.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch

from quantize.calibration.crew import Crew, LostError, Outcome, Work, of_the_device
from quantize.calibration.expert_weights import Norm, read_expert
from quantize.calibration.proof import Say
from quantize.calibration.quantizer import Rounder
from quantize.calibration.room import side_by_side
from quantize.calibration.routing import Routing
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.nvfp4.rounding.method import Method
from quantize.run.cluster import (
    RETRIES,
    SETTLE,
    brief,
    connected,
    opened,
    ours,
    resources,
    run_of,
    slots,
)
from quantize.run.files import sync
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.workers import all_devices


class File(NamedTuple):
    """A tensor in a file of its own (``quantize.calibration.store``)."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype


Files = tuple[File | None, ...]
"""Of ``Routing.given``."""

Sent = tuple[bytes, list[tuple[str, np.ndarray]]]
"""What became of an expert, pickled here, because Ray's own way knows no tensors; and its tensors
as bytes, which Ray copies as they are."""


@contextmanager
def on_cluster(
    address: str,
    checkpoint: Checkpoint,
    plan: Plan,
    record: Record,
    threads: int | None,
    say: Say,
) -> Iterator[Crew]:
    """The Ray cluster at ``address`` as a crew: as many members as it does tasks at once.

    Args:
        threads: and CPUs, for each task where the cluster has no GPUs; by default one.

    Raises:
        QuantizeError: if Ray is not installed, or not there.
    """
    with connected(address):
        run = run_of(checkpoint, plan, record, threads)
        count, shared, needs = slots(threads), _Shared(), resources(threads)

        def together(group: ExpertGroup, method: Method) -> int:
            # How many fit on a GPU, a task sees.
            many = method.together is not None and needs["num_gpus"] > 0
            return -(-group.num_experts // count) if many else 1

        members = [_Slot(run, plan.groups, shared, needs) for _ in range(count)]
        with Crew(members, say, together) as crew:
            yield crew


class _Shared:
    """What was said of a layer's tokens; and that it is in their files, for other machines."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._of: Routing | None = None
        self._files: Files = ()

    def files(self, routing: Routing) -> Files:
        with self._lock:
            if routing is not self._of:
                self._of, self._files = routing, tuple(map(_file_of, routing.given))
            return self._files


class _Slot:
    """A member: one task at a time."""

    name = "a task of the cluster"

    def __init__(
        self, run: bytes, groups: Sequence[ExpertGroup], shared: _Shared, needs: dict[str, int]
    ) -> None:
        import ray

        self._run, self._groups, self._shared = run, groups, shared
        self._task: Any = ray.remote(_round).options(
            **needs, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )
        self._pending: Any = None

    def round(self, work: Work) -> list[Outcome]:
        """See ``crew.Member``."""
        import ray

        norm = work.experts[0][1].post_norm
        if isinstance(norm, torch.nn.Module):
            norm = deepcopy(norm).cpu()
        numbers = [number for number, _ in work.experts]
        files = self._shared.files(work.routing)
        reason = ""
        for _ in range(1 + RETRIES):  # a GPU that fails is soon free again, and may get several
            self._pending = self._task.remote(
                self._run, self._groups.index(work.group), numbers, files, norm
            )
            try:
                found: list[Sent] = ray.get(self._pending)
                break
            except ray.exceptions.RayTaskError as error:
                if not (isinstance(error.cause, Exception) and of_the_device(error.cause)):
                    raise ours(error.cause) from error
                reason = brief(error.cause)
            except ray.exceptions.TaskCancelledError as error:
                raise LostError(brief(error)) from None
            except ray.exceptions.RayError as error:
                reason = brief(error)
        else:
            raise LostError(reason)
        # Ray's memory is read-only, and PyTorch knows no such tensors.
        return [
            pickle.loads(one)._replace(
                tensors={name: torch.from_numpy(data.copy()) for name, data in sent}
            )
            for one, sent in found
        ]

    def rest(self) -> None:
        """See ``crew.Member``."""
        self._pending = None

    def stop(self) -> None:
        """See ``crew.Member``."""
        import ray

        if self._pending is not None:
            ray.cancel(self._pending)


def _round(
    run: bytes, number: int, experts: list[int], files: Files, norm: Norm | None
) -> list[Sent]:
    """The task: some experts of the plan's group ``number``, on whichever machine it runs."""
    checkpoint, plan, rounder = _prepared(run)
    group, device = plan.groups[number], all_devices()[0]
    if isinstance(norm, torch.nn.Module):
        norm = norm.to(device)
    routing = _routing(files, group.num_experts, device)
    gate = plan.gates.of(group.prefix)
    size = side_by_side(group, rounder.method, [device])
    outcomes = []
    with torch.no_grad():
        for first in range(0, len(experts), size):
            batch = [
                (expert, read_expert(checkpoint, group, expert, gate, device, norm))
                for expert in experts[first : first + size]
            ]
            outcomes += rounder.round(Work(group, batch, routing))
    return [
        (
            pickle.dumps(one._replace(tensors={})),
            [(n, t.reshape(-1).view(torch.uint8).numpy()) for n, t in one.tensors.items()],
        )
        for one in outcomes
    ]


@lru_cache(maxsize=1)
def _prepared(run: bytes) -> tuple[Checkpoint, Plan, Rounder]:
    """Once for all experts that a process rounds."""
    checkpoint, plan, *_ = opened(run)
    settings = plan.options.calibration
    assert settings is not None
    return checkpoint, plan, Rounder(checkpoint, plan.layout, settings, plan.options.scales)


@lru_cache(maxsize=1)
def _routing(files: Files, experts: int, device: torch.device) -> Routing:
    """Once for all experts of a layer that a process rounds."""
    x, ids, weights, gradient = (None if file is None else _mapped(file) for file in files)
    assert x is not None and ids is not None and weights is not None
    return Routing(x, ids, weights, experts, device, gradient)


def _file_of(tensor: torch.Tensor | None) -> File | None:
    """The file that a tensor of the store is in, flushed to it."""
    if tensor is None:
        return None
    name = tensor.untyped_storage().filename
    assert name is not None
    path = Path(name).resolve()  # tasks run in other folders
    sync(path)
    return File(str(path), tuple(tensor.shape), tensor.dtype)


def _mapped(file: File) -> torch.Tensor:
    """The tensor in a file that another machine wrote, once it can be seen on this one."""
    path, count = Path(file.path), torch.Size(file.shape).numel()
    deadline = time.monotonic() + SETTLE
    while not path.is_file() or path.stat().st_size < count * file.dtype.itemsize:
        if time.monotonic() > deadline:
            raise QuantizeError(
                f"{path} was written by another machine and is not here; --work-dir, or else the "
                "target, must be on storage that all machines share"
            )
        time.sleep(0.5)
    whole = torch.from_file(str(path), shared=True, size=max(1, count), dtype=file.dtype)
    return whole[:count].view(file.shape)
