"""Running something in a process of its own, which may die: what it has found until then is kept.

Processes are forked from this one, which has imported vLLM and has computed nothing: so a process
costs no imports, and a device's state is its own. (Where PyTorch's threads have run before, OpenMP
would wait for them in the new process for ever.)
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

_PR_SET_PDEATHSIG = 1
"""Of prctl(2): which signal a process gets when the thread ends that has made it. Doctor's main
thread is that, and a kernel whose doctor is gone would keep the GPU busy."""

_LOG = 800
"""Characters of a dead process's last words."""


class How:
    """How processes begin: forked, or anew, which takes an import of vLLM each. Should this process
    have touched a GPU, forked ones cannot use it."""

    name = "fork"
    folder: Path | None = None
    """In such a process: for its files, which it does not remove if it is killed."""


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        records: what it has found, one after the other.
        problem: why it did not come to its end, in words; None if it did.
    """

    records: list[dict[str, Any]]
    problem: str | None


def run(work: Callable[..., None], *args: Any, seconds: float) -> Ended:
    """Call ``work(*args, emit)`` in a process of its own; ``emit`` takes what is to be kept.

    Args:
        work: a function of a module.
        seconds: after which the process is killed.
    """
    how = "spawn" if torch.cuda.is_initialized() else How.name
    with tempfile.TemporaryDirectory() as folder:
        found, log = Path(folder, "found"), Path(folder, "log")
        for file in (found, log):
            file.touch()
        context: Any = multiprocessing.get_context(how)
        process = context.Process(target=_work, args=(work, args, found, log))
        sys.stdout.flush()
        process.start()
        try:
            process.join(seconds)
            late = process.is_alive()
        finally:
            process.kill()
            process.join()
        records = _records(found)
        if late:
            problem = f"it was ended after {seconds:.0f} s"
        elif process.exitcode:
            problem = _died(process.exitcode)
        else:
            return Ended(records, None)
        at = next((r["at"] for r in reversed(records) if r.get("what") == "begins"), None)
        words = "" if late else " ".join(log.read_text(errors="replace").split())
        _, fatal, after = words.rpartition("Fatal Python error: ")  # faulthandler's
        words = after[:_LOG] if fatal else words[-_LOG:]
        where = f", {at}" if at else ""
        return Ended(records, f"{problem}{where}{f': {words}' if words else ''}")


def _died(code: int) -> str:
    if code > 0:
        return f"its process ended with exit status {code}"
    with suppress(ValueError):
        return f"its process died of {signal.Signals(-code).name}"
    return f"its process died of signal {-code}"


def _records(file: Path) -> list[dict[str, Any]]:
    """What was written whole."""
    found = []
    for line in file.read_text().splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _work(work: Callable[..., None], args: tuple[Any, ...], found: Path, log: Path) -> None:
    with suppress(OSError, AttributeError):  # on Linux, also if the parent is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    with found.open("a") as file, log.open("w") as words:
        for stream in (1, 2):
            os.dup2(words.fileno(), stream)
        faulthandler.enable(words)
        How.folder = found.parent

        def emit(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        try:
            work(*args, emit)
        except BaseException:
            words.truncate(0)  # of what libraries have said before, nothing is of interest now
            traceback.print_exc(limit=-3, file=words)
            words.flush()
            os._exit(1)
        os._exit(0)  # what libraries do at exit is not waited for
