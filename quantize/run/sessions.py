"""When, how long and on what machine a run was made, for the report.

A run that is resumed has several sessions. They are kept in one file of the record's folder until
the report is written. All this differs from run to run, though the checkpoint does not: with
``SOURCE_DATE_EPOCH`` set, as builds that are to be reproducible set it, nothing is recorded.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.filesize import decimal

from quantize.checkpoint.json_files import read_json
from quantize.errors import QuantizeError
from quantize.run.files import write_json

NAME = "sessions.json"
REPRODUCIBLE = "SOURCE_DATE_EPOCH"
"""Environment variable (https://reproducible-builds.org/specs/source-date-epoch/)."""


@dataclass(frozen=True)
class Machine:
    """What a session ran on; with ``--ray``, the machine that the command was started on.

    Attributes:
        system: the operating system and Python's version.
        cpu: its name; cores: how many this process may use.
        memory: bytes.
        gpus: those that the session used, each with its memory.
        cuda: the version of CUDA, if there are any.
    """

    system: str
    cpu: str
    cores: int
    memory: int
    gpus: list[str]
    cuda: str | None


@dataclass
class Session:
    """From one start of the command to its end.

    Attributes:
        started: UTC, as ISO 8601 has it.
        seconds: by phase, in their order; what was interrupted too.
        machine: where.
        cluster: with ``--ray``, how many tasks the cluster had room for; 0 without.
    """

    started: str
    seconds: dict[str, float]
    machine: Machine
    cluster: int = 0


class Sessions:
    """The sessions of a run; the last one is this process's.

    Args:
        folder: the record's.
        devices: what computes.
        before: how many seconds the command has been at work; the phase "checks".
    """

    def __init__(
        self, folder: Path, devices: Sequence[torch.device], before: float, cluster: int = 0
    ) -> None:
        self._file = folder / NAME
        self.all: list[Session] = []
        if REPRODUCIBLE in os.environ:
            return
        self.all = _read(self._file)
        start = datetime.fromtimestamp(time.time() - before, UTC).replace(microsecond=0)
        now = Session(start.isoformat(), {"checks": round(before, 3)}, machine(devices), cluster)
        self.all.append(now)
        self._write()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, time counts as this phase's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.all:
                seconds = self.all[-1].seconds
                spent = seconds.get(name, 0.0) + time.perf_counter() - start
                seconds[name] = round(spent, 3)
                self._write()

    def _write(self) -> None:
        with suppress(OSError):  # a full disk: what the run itself says of it is what matters
            write_json(self._file, {"sessions": [asdict(session) for session in self.all]})


def machine(devices: Sequence[torch.device]) -> Machine:
    """This machine."""
    gpus = [device for device in devices if device.type == "cuda"]
    found = [torch.cuda.get_device_properties(device) for device in gpus]
    return Machine(
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        _cpu(),
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        [f"{gpu.name} ({decimal(gpu.total_memory)})" for gpu in found],
        torch.version.cuda if gpus else None,
    )


def _cpu() -> str:
    """The name that Linux gives, else what Python knows."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _read(file: Path) -> list[Session]:
    """The sessions so far; none if the file is not whole: anyone may have written it."""
    with suppress(QuantizeError, TypeError, ValueError, LookupError, AttributeError):
        found = read_json(file)
        return [
            Session(
                _text(one["started"]),
                {name: _number(spent) for name, spent in one["seconds"].items()},
                _machine(**one["machine"]),
                int(_number(one["cluster"])),
            )
            for one in found["sessions"]
        ]
    return []


def _machine(
    system: object, cpu: object, cores: object, memory: object, gpus: object, cuda: object
) -> Machine:
    if not isinstance(gpus, list):
        raise TypeError("no list")
    return Machine(
        _text(system),
        _text(cpu),
        int(_number(cores)),
        int(_number(memory)),
        [_text(gpu) for gpu in gpus],
        None if cuda is None else _text(cuda),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("no string")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("no number")
    return float(value)
