"""A signal that reaches another thread wakes the main one.

Python runs signals' handlers in the main thread, when that next does something. The system gives a
signal to any thread: macOS often, and Linux now and then, to another than the main one (of 300 runs
that were sent SIGINT in the same place, three). A main thread that waits for a lock then, as one
does that waits for others to work, sleeps on, and Ctrl-C does nothing.

So a thread of its own is told of each signal as it comes (``signal.set_wakeup_fd``) and sends the
main thread another that means nothing, which ends its sleep.
"""

from __future__ import annotations

import os
import signal
import time
from threading import Thread, main_thread

NUDGE = signal.SIGURG
"""Ends a system call and does nothing else; a process that does not ask for it never sees it."""

_AFTER = (0.05, 0.2, 1.0)
"""Seconds before each nudge: one that comes just as the thread goes to sleep is lost, too."""

_told: tuple[int, int] | None = None
"""The process that has the thread, as a fork of it has not, and the file that tells the thread."""


def wake_the_main_thread() -> None:
    """From here on, a signal with a handler wakes it. To be called in the main thread."""
    global _told
    if _told is None or _told[0] != os.getpid():
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        Thread(target=_nudge, args=(reads,), name="signals", daemon=True).start()
        _told = os.getpid(), writes
    if signal.getsignal(NUDGE) is signal.SIG_DFL:
        signal.signal(NUDGE, lambda *_: None)
    before = signal.set_wakeup_fd(_told[1], warn_on_full_buffer=False)
    if before not in (-1, _told[1]):  # that of an event loop, which wakes by itself
        signal.set_wakeup_fd(before)


def _nudge(reads: int) -> None:
    while came := os.read(reads, 64):
        if all(number == NUDGE for number in came):
            continue
        for seconds in _AFTER:
            time.sleep(seconds)
            main = main_thread().ident
            if main is not None and main_thread().is_alive():
                signal.pthread_kill(main, NUDGE)
