"""Compiling, which happens once on a machine, takes no time from what is to be found out: how long
a kernel took to be ready, and how much of that is taken for compiling."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

READY = 4.0
"""Seconds in which a layer that was compiled before is converted and called: what is beyond them
is compiling. (Neither vLLM's kernels nor Triton, numba or Humming say when they compile.)"""
ASKED = 8.0
"""The same, for which kernels could run."""
MOST = 240.0
"""Seconds for compiling, of each layer: what takes longer hangs."""

SLOW, PREPARED = "slow", "prepared"
"""Kinds of records."""


class Spent:
    """How many seconds of a preparation were for compiling, once that is over."""

    compiling = 0.0


@contextmanager
def preparing(
    usual: float, emit: Callable[[dict[str, Any]], None], **where: Any
) -> Iterator[Spent]:
    """Within, something is made ready. After ``usual`` seconds a record says that it is slow, and
    at the end another how much longer than that it took."""
    spent, begin = Spent(), time.monotonic()
    timer = threading.Timer(usual, emit, [{"what": SLOW, **where}])
    timer.daemon = True
    timer.start()
    try:
        yield spent
    finally:
        timer.cancel()
        timer.join()  # records are written by one thread at a time
        spent.compiling = min(MOST, max(0.0, time.monotonic() - begin - usual))
        emit({"what": PREPARED, **where, "compiling": round(spent.compiling, 2)})


def compiled(records: list[dict[str, Any]]) -> float:
    """The seconds of all that was prepared."""
    return sum(record["compiling"] for record in records if record["what"] == PREPARED)


def listener(say: Callable[[str], None], name: str) -> Callable[[dict[str, Any]], float]:
    """For ``children.Started.finish``: says once that ``name`` is compiled, and gives a process
    time for that."""
    told, given = False, 0.0

    def hear(record: dict[str, Any]) -> float:
        nonlocal told, given
        if record["what"] == PREPARED:  # what was not needed is taken back
            more, given = record["compiling"] - given, 0.0
            return float(more)
        if record["what"] != SLOW:
            return 0.0
        if not told:
            say(f"{name}: compiling what never was compiled here; checks lose no time by that")
        told, given = True, MOST
        return MOST

    return hear
