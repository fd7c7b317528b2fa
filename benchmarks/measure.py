"""Run a command and watch its time and memory, that of the processes it starts included."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class CommandError(Exception):
    """A command failed."""


class Sample(NamedTuple):
    """Bytes at one moment.

    Attributes:
        rss: resident memory, pages of mapped files and libraries included.
        anonymous: the part that is the processes' own: no file is behind it.
    """

    seconds: float
    rss: int
    anonymous: int


class Measured(NamedTuple):
    """What a command took.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: of its processes, user and system.
        others: how many cores everything else on the machine kept busy meanwhile, on average.
        output: what it wrote to stdout.
        peak_rss: resident, as the kernel kept it (``VmHWM``), or the sampled sum over its
            processes where that is more.
        peak_anonymous: sampled.
    """

    seconds: float
    cpu_seconds: float
    others: float
    output: str
    peak_rss: int
    peak_anonymous: int
    samples: list[Sample]


def measure(
    command: list[str], environment: Mapping[str, str] | None = None, interval: float = 0.02
) -> Measured:
    """Run ``command`` and sample its memory every ``interval`` seconds.

    Raises:
        CommandError: if it fails, with the end of what it wrote to stderr.
    """
    samples: list[Sample] = []
    highest = 0
    ended = threading.Event()

    def watch(root: int) -> None:
        nonlocal highest
        while not ended.wait(interval):
            now = time.perf_counter() - started
            rows = [_status(pid) for pid in _tree(root)]
            rss, own = (sum(row.get(key, 0) for row in rows) for key in ("VmRSS", "own"))
            samples.append(Sample(now, rss, own))
            highest = max(highest, rows[0].get("VmHWM", 0))

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        busy, own = _busy(), _children()
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        watcher = threading.Thread(target=watch, args=(process.pid,))
        watcher.start()
        try:
            code = process.wait()
            seconds = time.perf_counter() - started
        finally:
            ended.set()
            watcher.join()
            if process.poll() is None:
                process.kill()
                process.wait()
        own = _children() - own
        others = max(0.0, (_busy() - busy - own) / seconds)
        for stream in (out, err):
            stream.seek(0)
        if code:
            tail = err.read().decode(errors="replace")[-3000:]
            raise CommandError(f"{' '.join(command)[:300]}: exit code {code}\n{tail}")
        return Measured(
            seconds,
            own,
            others,
            out.read().decode(errors="replace"),
            max([highest, *(sample.rss for sample in samples)]),
            max((sample.anonymous for sample in samples), default=0),
            samples,
        )


def _busy() -> float:
    """Seconds that all cores have worked, or were taken away, since the machine started."""
    user, nice, system, _idle, _wait, *rest = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _tree(root: int) -> list[int]:
    """``root`` and all processes below it."""
    found = [root]
    for pid in found:
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has just ended
    return found


def _status(pid: int) -> dict[str, int]:
    """Bytes by name, of a process's ``/proc/PID/status``; nothing if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
        if name in ("VmHWM", "VmRSS", "RssAnon", "RssShmem")
    }
    sizes["own"] = sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
    return sizes
