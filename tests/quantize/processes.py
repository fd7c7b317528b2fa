"""Running the command in processes that can be killed at a chosen moment.

The processes are forked from one that has imported everything, so each starts at once. A moment is
given as the number of a call that changes the file system, not as a time. On a machine of any speed
it is then within the run, and every state that a run can leave behind lies between two such calls.
"""

import io
import multiprocessing
import os
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantize.cli import app as cli

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, "tests.quantize.warm"])

_CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: its exit code; the negative number of the signal if it was killed.
        output: what it wrote to stdout and stderr.
        calls: the number of calls that changed the file system; 0 if it was killed.
    """

    code: int | None
    output: str
    calls: int


def run(folder: Path, *args: object, at: int = 0, send: signal.Signals = signal.SIGKILL) -> Ended:
    """Run ``nvfp4-moe ARGS`` in ``folder`` in a process of its own.

    Args:
        at: the number (from 1) of the call at which the process gets the signal ``send``; 0 for
            none.
    """
    words = [str(arg) for arg in args]
    process = FORKED.Process(target=_run, args=(folder, words, at, send))
    process.start()
    process.join(60)
    calls = folder / "calls"
    ended = Ended(
        process.exitcode,
        (folder / "output").read_text(),
        int(calls.read_text() or 0) if calls.exists() else 0,  # empty if killed while writing it
    )
    calls.unlink(missing_ok=True)
    return ended


def _run(folder: Path, words: list[str], at: int, send: signal.Signals) -> None:
    os.chdir(folder)
    output = os.open("output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    numbers = _send_within_call(at, send)
    try:
        cli.app(words)
    finally:
        Path("calls").write_text(str(next(numbers) - 1))


def _send_within_call(at: int, send: signal.Signals) -> count:
    """Replace the functions that change the file system with ones that count their calls.

    Call number ``at`` sends the signal ``send`` to this process before it takes effect. If the call
    writes data, half of the data is written first. If it opens a file for writing, the file is
    created first.
    """
    numbers = count(1)

    def counted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(numbers) != at:
                return function(*args, **kwargs)
            if name == "pwrite":
                descriptor, data, position = args
                function(descriptor, data[: len(data) // 2], position)
            elif name == "open":
                function(*args, **kwargs)  # create the file, which is empty
            os.kill(os.getpid(), send)
            return function(*args, **kwargs)

        return call

    for name in (*_CALLS, "pwrite"):
        setattr(os, name, counted(getattr(os, name), name))
    plain = io.open
    writing = counted(plain, "open")

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return (writing if set(mode) & set("wx") else plain)(file, mode, *args, **kwargs)

    io.open = opened  # type: ignore[assignment]
    return numbers
