"""Time and memory of quantizing on this machine's CPU: ours, llm-compressor's, and a file copy.

    python -m benchmarks.quantize_speed [--work DIR] [--peer [VERSION ...]] [--rounds 3]

In DIR it makes, where they are missing, ``slice`` (``benchmarks.m3_slice``: a MiniMax-M3 layer at
true expert sizes, 1.8 GB) and with ``--peer`` a virtual environment for each version of
llm-compressor. All take turns, round by round; the table has the medians and, in brackets, each
round. Before each run the source is read once, so that all find it in the page cache.

Every command runs in a process of its own, and its time is that of the whole command, imports
included; "work" is the part after them, as the command itself tells it. A "first run" finds no
compiled kernels. How busy others kept the machine meanwhile is printed below the table; seconds
suffer from it, CPU seconds little. Memory: "peak RSS" is everything resident, mapped files too;
"own" is what no file is behind.

Ours waits until its output is on the disk (fsync), llm-compressor does not; the copy is there in
both ways.

llm-compressor from 0.14 on takes one file after the other on a CPU, however many workers are asked
for (``compressed_tensors.entrypoints.convert.memory.exec_jobs_dynamic``); 0.13 has threads there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import m3_slice
from benchmarks.measure import CommandError, Measured, measure

PEERS = ["0.14.0.1", "0.13.0"]
PEER_TORCH = "torch==2.13.0+cpu"
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"

COPY = """
import os, shutil, sys
from pathlib import Path
source, target, sync = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fsync"
target.mkdir()
for file in source.iterdir():
    shutil.copyfile(file, target / file.name)
    if sync:
        descriptor = os.open(target / file.name, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
"""

# `ignore`: as ours, the router stays as it is; norms it leaves by itself.
PEER_RUN = """
import sys, time
from llmcompressor import model_free_ptq
source, target, workers = sys.argv[1:]
started = time.perf_counter()
model_free_ptq(
    source, target, scheme="NVFP4A16", ignore=["re:.*gate$"], max_workers=int(workers), device="cpu"
)
print(f"WORK {time.perf_counter() - started:.2f} s")
"""

# The same work three times in one process; the last time counts. What a process pays once, such as
# memory that the system gives it for the first time, a real checkpoint of 500 slices pays once too.
REPEATED = """
import shutil, sys
from pathlib import Path
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
source, target, rule = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
with Checkpoint(source) as checkpoint:
    steps = plan(checkpoint, Options(scales=rule))
    for _ in range(3):
        shutil.rmtree(target, ignore_errors=True)
        done = execute(checkpoint, steps, target)
print(f"WORK {done.seconds:.2f} s")
"""

_WORK = (re.compile(r"WORK ([\d.]+) s"), re.compile(r"files?, ([\d.]+) s"))
"""Where commands print the seconds of their work: the peer's run above, and ours."""


COLUMNS = (
    "seconds, whole command",
    "work",
    "CPU seconds",
    "GB/s of input",
    "peak RSS, GB",
    "own, GB",
    "output bytes",
)


class Contestant(NamedTuple):
    """What runs, and how: ``command(source, target)``."""

    label: str
    command: Callable[[Path, Path], list[str]]
    environment: dict[str, str]


class Run(NamedTuple):
    """One run of a contestant."""

    measured: Measured
    output_bytes: int

    @property
    def work(self) -> float | None:
        """Seconds that the command itself reports, if it does."""
        for pattern in _WORK:
            if match := pattern.search(self.measured.output):
                return float(match[1])
        return None


def copy(sync: bool) -> Contestant:
    """A plain copy of all files."""
    how = "fsync" if sync else "no fsync"
    return Contestant(
        f"file copy, {how}", lambda s, t: [sys.executable, "-c", COPY, str(s), str(t), how], {}
    )


def ours(rule: str, cache: Path, more: list[str]) -> Contestant:
    """``nvfp4-moe quantize``; ``cache`` is where numba keeps compiled kernels."""
    command = str(Path(sys.executable).with_name("nvfp4-moe"))
    return Contestant(
        " ".join([f"ours, --scales {rule}", *more]),
        lambda s, t: [command, "quantize", str(s), str(t), "--scales", rule, *more],
        {"NUMBA_CACHE_DIR": str(cache)},
    )


def repeated(rule: str, cache: Path) -> Contestant:
    """Ours, three times in one process."""
    return Contestant(
        f"ours, --scales {rule}, third time in a process",
        lambda s, t: [sys.executable, "-c", REPEATED, str(s), str(t), rule],
        {"NUMBA_CACHE_DIR": str(cache)},
    )


def peer(version: str, python: Path, workers: int) -> Contestant:
    """llm-compressor's ``model_free_ptq``."""
    return Contestant(
        f"llm-compressor {version}, {workers} worker{'s' * (workers > 1)}",
        lambda s, t: [str(python), "-c", PEER_RUN, str(s), str(t), str(workers)],
        {"HF_HUB_OFFLINE": "1"},
    )


def peer_python(folder: Path, version: str) -> Path:
    """The Python of an environment with this llm-compressor, made if it is not there.

    PyTorch comes first, as its CPU build and without torchvision, as in the Makefile.
    """
    python = folder / "bin" / "python"
    stamp = folder / ".complete"
    if stamp.exists():
        return python
    print(f"Installing llm-compressor {version} in {folder}", file=sys.stderr)
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, PEER_TORCH], check=False).returncode:
        subprocess.run([*pip, PEER_TORCH, "--index-url", PYTORCH_INDEX], check=True)
    subprocess.run([*pip, f"llmcompressor=={version}"], check=True)
    stamp.touch()
    return python


def run(contestant: Contestant, source: Path, target: Path) -> Run | None:
    """Run it once into ``target``, which is gone afterwards as it was before; None if it fails."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()  # what others wrote is not to be waited for in this run
    for file in source.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
    try:
        environment = os.environ | contestant.environment
        measured = measure(contestant.command(source, target), environment)
        size = sum(f.stat().st_size for f in target.rglob("*.safetensors"))
    except CommandError as error:
        print(f"{contestant.label}: FAILED\n{error}", file=sys.stderr)
        return None
    finally:
        shutil.rmtree(target, ignore_errors=True)
    done = Run(measured, size)
    print(
        f"{contestant.label}: {measured.seconds:.2f} s, {measured.cpu_seconds:.2f} s of CPU, "
        f"others used {measured.others:.2f} cores, peak {measured.peak_rss / 1e9:.2f} GB",
        file=sys.stderr,
    )
    return done


def row(label: str, tried: list[Run | None], nbytes: int) -> str:
    """A row of the table: medians, with each round's in brackets where there are several."""
    runs = [r for r in tried if r is not None]
    if len(runs) < len(tried) or not runs:
        return f"| {label} | failed {len(tried) - len(runs)} of {len(tried)} | | | | | | |"
    seconds = [r.measured.seconds for r in runs]
    median = statistics.median(seconds)
    each = f" ({', '.join(f'{s:.1f}' for s in seconds)})" if len(runs) > 1 else ""
    works = [r.work for r in runs if r.work is not None]
    done = statistics.median(works) if works else 0.0
    work = f"{done:.2f} s, {nbytes / done / 1e9:.2f} GB/s" if works else ""
    cpu = statistics.median(r.measured.cpu_seconds for r in runs)
    rss = max(r.measured.peak_rss for r in runs) / 1e9
    own = max(r.measured.peak_anonymous for r in runs) / 1e9
    out = runs[-1].output_bytes
    return (
        f"| {label} | {median:.1f}{each} | {work} | {cpu:.1f} | {nbytes / median / 1e9:.3f} "
        f"| {rss:.2f} | {own:.2f} | {out:,} |"
    )


def versions(peers: list[Path]) -> list[str]:
    """What ran, and on what."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = [
        f"{model[1] if model else platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}",
        f"ours: {commit or 'no git'}, {_installed(sys.executable, ['torch', 'numba', 'numpy'])}",
    ]
    names = ["llmcompressor", "compressed-tensors", "torch", "transformers"]
    return lines + [f"peer: {_installed(str(python), names)}" for python in peers]


def _installed(python: str, names: list[str]) -> str:
    if python == sys.executable:
        found = {name: _version(name) for name in names}
    else:
        code = "import importlib.metadata as m, sys; [print(m.version(n)) for n in sys.argv[1:]]"
        out = subprocess.run([python, "-c", code, *names], capture_output=True, text=True)
        found = dict(zip(names, out.stdout.split(), strict=True))
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Parse the arguments, run everything, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("/tmp/nvfp4-moe-speed"), metavar="DIR")
    parser.add_argument("--source", type=Path, help="a checkpoint to use in place of the slice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scales", nargs="*", default=["max", "mse"], help="of ours")
    parser.add_argument(
        "--peer",
        nargs="*",
        metavar="VERSION",
        help=f"llm-compressor as well; without versions: {' '.join(PEERS)}",
    )
    parser.add_argument("--workers", nargs="*", type=int, default=[1, 2], help="of the peer")
    parser.add_argument("more", nargs="*", help="after --: more options for ours")
    args = parser.parse_args()

    work: Path = args.work
    source: Path = args.source or work / "slice"
    if not args.source and not (source / "config.json").exists():
        m3_slice.write(source, m3_slice.Slice())
    wanted = [] if args.peer is None else args.peer or PEERS
    peers = {version: peer_python(work / f"peer-{version}", version) for version in wanted}
    cache = work / "numba-cache"
    shutil.rmtree(cache, ignore_errors=True)
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))

    own = [ours(rule, cache, args.more) for rule in args.scales]
    again = [repeated(rule, cache) for rule in args.scales]
    everyone = [copy(sync=False), copy(sync=True), *own, *again]
    for version, python in peers.items():
        everyone += [peer(version, python, workers) for workers in args.workers]
    first = {c.label: [run(c, source, work / "out")] for c in own}
    runs: dict[str, list[Run | None]] = {c.label: [] for c in everyone}
    for turn in range(args.rounds):
        start = turn * len(everyone) // args.rounds  # whoever comes first finds memory used least
        for contestant in everyone[start:] + everyone[:start]:
            runs[contestant.label].append(run(contestant, source, work / "out"))

    print(f"\n{source}: {nbytes / 1e9:.2f} GB, {args.rounds} rounds\n")
    print("| | " + " | ".join(COLUMNS) + " |")
    print("|" + " --- |" * (len(COLUMNS) + 1))
    for label, some in ({f"{k}, first run": v for k, v in first.items()} | runs).items():
        print(row(label, some, nbytes))
    print()
    others = [r.measured.others for some in runs.values() for r in some if r is not None]
    if others:
        print(f"- others on the machine used {min(others):.1f} to {max(others):.1f} cores")
    for line in versions(list(peers.values())):
        print(f"- {line}")


if __name__ == "__main__":
    main()
