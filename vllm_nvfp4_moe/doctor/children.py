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
import time
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


_LOOKS = 0.5
"""Seconds between two looks at what a process has found."""


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


class Started:
    """A process of its own that calls ``work(*args, emit)``; ``emit`` takes what is to be kept.

    Args:
        work: a function of a module.
        waits: ``work`` is given a queue before ``emit``, whose ``get()`` waits for what
            :meth:`tell` is given: it can make ready before it is known what it is to do.

    Attributes:
        found: the file of what it has found so far.
    """

    def __init__(self, work: Callable[..., None], *args: Any, waits: bool = False) -> None:
        how = "spawn" if torch.cuda.is_initialized() else How.name
        context: Any = multiprocessing.get_context(how)
        self._folder = tempfile.TemporaryDirectory()
        self.found, self._log = (Path(self._folder.name, name) for name in ("found", "log"))
        for file in (self.found, self._log):
            file.touch()
        self._told = context.SimpleQueue()
        if waits:
            args = (*args, self._told)
        self._process = context.Process(target=_work, args=(work, args, self.found, self._log))
        sys.stdout.flush()
        self._process.start()

    def tell(self, what: Any) -> None:
        """Have it go on, with ``what``."""
        self._told.put(what)

    def end(self) -> None:
        """Have it end now, if it has not."""
        self._process.kill()
        self._process.join()
        self._folder.cleanup()

    def finish(
        self, seconds: float, hear: Callable[[dict[str, Any]], float] = lambda _: 0.0
    ) -> Ended:
        """Wait for its end.

        Args:
            seconds: after which it is killed.
            hear: is given what was found as soon as it is; so many more seconds it may take.
        """
        try:
            late, end, heard = False, time.monotonic() + seconds, 0
            while self._process.is_alive() and not late:
                self._process.join(min(_LOOKS, max(0.0, end - time.monotonic())))
                records = _records(self.found)
                more = sum(hear(record) for record in records[heard:])
                end, heard, seconds = end + more, len(records), seconds + more
                late = self._process.is_alive() and time.monotonic() >= end
            self._process.kill()
            self._process.join()
            records = _records(self.found)
            if late:
                problem = f"it was ended after {seconds:.0f} s"
            elif self._process.exitcode:
                problem = _died(self._process.exitcode)
            else:
                return Ended(records, None)
            at = next((r["at"] for r in reversed(records) if r.get("what") == "begins"), None)
            words = "" if late else " ".join(self._log.read_text(errors="replace").split())
            _, fatal, after = words.rpartition("Fatal Python error: ")  # faulthandler's
            words = after[:_LOG] if fatal else words[-_LOG:]
            where = f", {at}" if at else ""
            return Ended(records, f"{problem}{where}{f': {words}' if words else ''}")
        finally:
            self.end()


def run(work: Callable[..., None], *args: Any, seconds: float) -> Ended:
    """Start a process and wait for its end, as :class:`Started` does both."""
    return Started(work, *args).finish(seconds)


def _died(code: int) -> str:
    if code > 0:
        return f"its process ended with exit status {code}"
    with suppress(ValueError):
        return f"its process died of {signal.Signals(-code).name}"
    return f"its process died of signal {-code}"


def _records(file: Path) -> list[dict[str, Any]]:
    """What was written whole."""
    found = []
    whole, _, _ = file.read_text().rpartition("\n")
    for line in whole.splitlines():
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
