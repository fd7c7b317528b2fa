"""Everything that wants a GPU, in one command: tests, benchmarks and engines of ``jobs.toml``.

    python -m tests.gpu OUT [JOB...] [--seconds 1500] [--beside 6] [--set m3=FOLDER]

Time on a machine with a GPU is short, so jobs run beside each other where that does no harm. A job
of ``jobs.toml`` has a name, a command for the shell, and a pool:

- ``shared``: up to ``--beside`` of them at once on the first GPU (tests, engines);
- ``timed``: one at a time, on the last GPU. If that is the first as well, they come before the
  others, so that nothing is beside them;
- ``all``: after all others, alone, with all GPUs. They are left out where there is one GPU alone.

``{NAME}`` in a command is what ``--set NAME=VALUE`` says, ``{out}`` is OUT, ``{{`` a brace; a job
whose names are not set is left out. Each job's output goes to OUT/NAME.log. OUT/jobs.json has each
one's exit status and seconds, and is written whenever a job ends. A job over its ``limit`` of
seconds, or the whole over ``--seconds``, is killed with all that it started; so is every job when
this process ends, even if that is killed. The exit status is 1
if a job failed, was killed or did not begin.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import string
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
POOLS = ("shared", "timed", "all")

_WATCHED = (
    'trap "" HUP INT TERM; { read -r -u $0 _; kill -KILL 0; } & '
    'trap - HUP INT TERM; eval "exec $0<&-"; exec bash -c "$1"'
)
"""Becomes the job's command, beside which something waits for this process to end, however it does,
and then kills all of the job: the GPU would stay busy. $0 is the end of a pipe to read from, whose
other end this process alone holds."""


@dataclass(frozen=True)
class Job:
    """One command of ``jobs.toml``."""

    name: str
    command: str
    pool: str = "shared"
    limit: float = 600.0
    """Seconds after which it is killed."""

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"job {self.name}: pool is {self.pool!r}, not one of {POOLS}")


@dataclass(frozen=True)
class Ended:
    """What became of a job: its exit status, None if it did not begin."""

    name: str
    status: int | None
    seconds: float
    why: str = ""


def read(file: Path) -> list[Job]:
    """The jobs of a file, in its order, which is that of their starts."""
    jobs = [Job(**job) for job in tomllib.loads(file.read_text())["job"]]
    names = [job.name for job in jobs]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{file}: several jobs have the name {', '.join(sorted(double))}")
    return jobs


def lacks(job: Job, values: dict[str, str]) -> list[str]:
    """The names in a job's command that have no value."""
    names = [name for _, name, _, _ in string.Formatter().parse(job.command) if name]
    return sorted(set(names) - set(values))


class Run:
    """Jobs in their pools.

    Args:
        out: a folder, made if need be.
        gpus: how many there are.
        seconds: from now until all is killed.
        beside: how many ``shared`` jobs run at once.
        values: for the names in commands.
    """

    def __init__(
        self, out: Path, gpus: int, seconds: float, beside: int, values: dict[str, str]
    ) -> None:
        self.out, self.gpus, self.beside = out, gpus, beside
        self.values = {**values, "out": str(out)}
        self.until = time.monotonic() + seconds
        self.ended: list[Ended] = []
        out.mkdir(parents=True, exist_ok=True)

    def all(self, jobs: Sequence[Job]) -> list[Ended]:
        """Run them; what became of each, in the order of their ends."""
        able = []
        for job in jobs:
            if missing := lacks(job, self.values):
                self._end(Ended(job.name, None, 0.0, f"needs --set {missing[0]}=..."))
            elif job.pool == "all" and self.gpus < 2:
                self._end(Ended(job.name, None, 0.0, "needs two GPUs"))
            else:
                able.append(job)
        pools = {pool: [job for job in able if job.pool == pool] for pool in POOLS}
        last = str(self.gpus - 1)
        with ThreadPoolExecutor(1) as timed, ThreadPoolExecutor(self.beside) as shared:
            first = [timed.submit(self._run, job, last) for job in pools["timed"]]
            if self.gpus < 2:
                _wait(first)
            _wait([*first, *(shared.submit(self._run, job, "0") for job in pools["shared"])])
            _wait(timed.submit(self._run, job, None) for job in pools["all"])
        return self.ended

    def _run(self, job: Job, gpu: str | None) -> None:
        began = time.monotonic()
        left = min(job.limit, self.until - began)
        if left <= 0:
            self._end(Ended(job.name, None, 0.0, "the time was over"))
            return
        env = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        command, why = job.command.format(**self.values), ""
        with (self.out / f"{job.name}.log").open("w") as log:
            print(f"$ {command}", file=log, flush=True)
            alive, held = os.pipe()  # nobody inherits the end that is held here
            process = subprocess.Popen(
                ["bash", "-c", _WATCHED, str(alive), command], stdout=log, stderr=log, env=env,
                stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[alive],
            )  # fmt: skip
            os.close(alive)
            try:
                process.wait(left)
            except subprocess.TimeoutExpired:
                why = f"killed after {left:.0f} s"
            # Also what a job that has ended left behind, such as an engine's processes.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(held)
        self._end(Ended(job.name, process.returncode, time.monotonic() - began, why))

    def _end(self, ended: Ended) -> None:
        self.ended.append(ended)
        print(
            f"{ended.name}: {'not run' if ended.status is None else f'exit {ended.status}'},"
            f" {ended.seconds:.0f} s{ended.why and f', {ended.why}'}",
            flush=True,
        )
        rows = [asdict(each) for each in list(self.ended)]
        (self.out / "jobs.json").write_text(json.dumps(rows, indent=1) + "\n")


def _wait(futures: Iterable[Any]) -> None:
    for future in futures:
        future.result()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("names", nargs="*", metavar="JOB", help="these alone")
    parser.add_argument("--jobs", type=Path, default=HERE / "jobs.toml")
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--beside", type=int, default=6)
    parser.add_argument("--gpus", type=int, help="as many as PyTorch sees, if not said")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    args = parser.parse_args(arguments)
    jobs = read(args.jobs)
    if unknown := set(args.names) - {job.name for job in jobs}:
        parser.error(f"{args.jobs} has no job {', '.join(sorted(unknown))}")
    gpus = args.gpus
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    if not gpus:
        parser.error("there is no GPU")
    values = dict(pair.split("=", 1) for pair in args.set)
    chosen = [job for job in jobs if not args.names or job.name in args.names]
    ended = Run(args.out, gpus, args.seconds, args.beside, values).all(chosen)
    return int(any(each.status != 0 or each.why for each in ended))


if __name__ == "__main__":
    # Else Ctrl-C, which jobs do not get, would wait for them.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
