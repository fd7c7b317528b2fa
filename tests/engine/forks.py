"""Calls in processes of their own, which are forks of this one.

What this process has imported they have at once. A crash, or a call that takes too long, ends one
call alone, and memory and what a library keeps for a process end with it.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a call returned, or the error that it ended with; and how long it took."""

    value: Any
    error: str | None
    seconds: float


def run_all(
    calls: dict[str, Callable[[], Any]],
    folder: Path,
    limit: float,
    workers: int,
    done: Callable[[str, Outcome], None] = lambda name, outcome: None,
) -> dict[str, Outcome]:
    """Carry out ``calls``, ``workers`` of them at once.

    Args:
        calls: by name, what returns a value that JSON has.
        folder: for each call, NAME.log gets its output, and NAME.json its outcome.
        limit: the seconds that a call may take.
        done: is called with each name and outcome as they come.
    """
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    waiting, outcomes = list(calls), {}
    running: dict[str, tuple[Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            child = context.Process(target=_child, args=(calls[name], folder, name))
            child.start()
            running[name] = child, time.monotonic()
        multiprocessing.connection.wait([child.sentinel for child, _ in running.values()], 1)
        for name, (child, begun) in list(running.items()):
            seconds = time.monotonic() - begun
            if child.is_alive() and seconds < limit:
                continue
            late = child.is_alive()
            _kill(child)
            outcome = _outcome(folder / f"{name}.json", late, child.exitcode, seconds)
            outcomes[name] = outcome
            done(name, outcome)
            del running[name]
    return outcomes


def _child(call: Callable[[], Any], folder: Path, name: str) -> None:
    os.setsid()  # so that what it starts can be ended with it
    output = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    found: dict[str, Any]
    try:
        found = {"value": call()}
    except BaseException as error:
        traceback.print_exc()
        found = {"error": first_cause(error)}
    (folder / f"{name}.json").write_text(json.dumps(found))
    os._exit(0)  # threads may abort a process that ends


def _kill(child: Any) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.join()


def _outcome(file: Path, late: bool, code: int, seconds: float) -> Outcome:
    seconds = round(seconds, 1)
    if file.exists():
        found = json.loads(file.read_text())
        file.unlink()
        return Outcome(found.get("value"), found.get("error"), seconds)
    if late:
        return Outcome(None, f"it took longer than {seconds:.0f} s", seconds)
    return Outcome(None, f"its process ended with {code}", seconds)


def first_cause(error: BaseException) -> str:
    """The error that the others came from: its type, and the first line that says anything."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ == "ValidationError" and len(lines) > 1:  # pydantic's first is a count
        lines = [lines[1].partition(" [type=")[0]]
    if not lines:
        place = traceback.extract_tb(error.__traceback__)[-1]
        lines = [f"{place.line} ({Path(place.filename).name}, line {place.lineno})"]
    return f"{type(error).__name__}: {lines[0]}"
