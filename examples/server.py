"""A vLLM server as a context manager: started, awaited, and gone afterwards, whatever happened."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console


class ServerError(RuntimeError):
    """The server did not come up; the message holds the end of its log."""


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_taken(port: int) -> bool:
    """Whether something already listens on `port`: its answers would pass for our server's."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def environment() -> dict[str, str]:
    """This process's environment, with what a small CPU machine needs where it says nothing."""
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; the default is half of the memory
        cores = len(os.sched_getaffinity(0))
        if cores <= 4 and "VLLM_CPU_OMP_THREADS_BIND" not in env:
            # vLLM would pin itself to all cores but one, which on two cores is half the machine,
            # and the same half for every server on it.
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            env.setdefault("OMP_NUM_THREADS", str(cores))
    return env


@contextlib.contextmanager
def serving(
    model: Path, options: Sequence[str], *, port: int, log: Path, console: Console, limit: float
) -> Iterator[str]:
    """Serve `model` with the given `vllm serve` options; yields the API's base URL, ".../v1".

    Its output goes to the file `log`. Raises ServerError when the port is taken, when the server
    ends, or when it is not healthy within `limit` seconds. On leaving, the server and everything
    it started are stopped.
    """
    with started(model, options, port=port, log=log, console=console) as process:
        await_health(process, port, log, console, limit)
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def started(
    model: Path,
    options: Sequence[str],
    *,
    port: int,
    log: Path,
    console: Console,
    variables: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """As `serving`, without waiting for it; `variables` are added to the environment."""
    if port_taken(port):
        raise ServerError(f"port {port} is in use; choose another with --port")
    command = [*vllm(), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
    console.print(f"[dim]{' '.join(command)}[/]\n[dim]log: {log}[/]", highlight=False)
    with log.open("w") as output:
        # A session of its own: Ctrl-C in the terminal reaches us alone, and we stop it in order.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment() | dict(variables or {}),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def vllm() -> list[str]:
    """The `vllm` command beside this interpreter, or its module where only that is importable."""
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def await_health(
    process: subprocess.Popen[bytes],
    port: int,
    log: Path,
    console: Console,
    limit: float,
    others: Sequence[tuple[subprocess.Popen[bytes], Path]] = (),
) -> None:
    """Return when the server answers; ServerError if it ends, or after `limit` seconds.

    `others`: its further nodes, with their logs; without one of them it would wait for minutes.
    """
    start = time.monotonic()
    with console.status("starting") as status:
        while (waited := time.monotonic() - start) < limit:
            for one, its_log in ((process, log), *others):
                if one.poll() is not None:
                    raise ServerError(
                        f"the server ended with code {one.returncode}:\n{tail(its_log)}"
                    )
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
            ):
                return
            status.update(f"starting the server, {waited:.0f} s (about a minute on a CPU)")
            time.sleep(0.5)
    raise ServerError(f"the server was not ready after {limit:.0f} s:\n{tail(log)}")


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """Interrupt the server, wait up to `patience` seconds, then kill whatever is left of it."""
    # A second Ctrl-C must not cut this short, or the engine would stay behind. It interrupts the
    # main thread, which alone may say what it does.
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # engine processes that outlived their parent
        process.wait()
    finally:
        if main:
            signal.signal(signal.SIGINT, previous)


def tail(log: Path, lines: int = 30) -> str:
    """The last `lines` lines of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
