"""Ctrl-C and SIGTERM, which schedulers and containers send: both end a command in the same way.

While nothing is to be tidied up they end the process at once, without a traceback: as long as the
command starts, while it downloads, and again once it is done. An exception would not do there:
within an import, other code may turn it into an error of its own, or print it and go on; and the
hub's client would wait until all files that are on their way are here.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from quantize.cli.wake import wake_the_main_thread

SIGNALS = (signal.SIGINT, signal.SIGTERM)

INTERRUPTED = 130
"""The exit code, of both."""

Handler = Callable[[int, Any], Any]

_over = False
"""Whether a command has done its work."""

log: Callable[[str], None] | None = None
"""Is told, too, what is said then, if a command keeps a log."""


def end_at_once() -> None:
    """From here on, both signals end the process with a line."""
    _handle(_ending())


@contextmanager
def ending_at_once(advice: str = "nothing was changed") -> Iterator[None]:
    """Within, both signals end the process with a line.

    Args:
        advice: what to tell the user.
    """
    before = _handle(_ending(advice))
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def interrupting() -> Iterator[None]:
    """Within, both signals raise KeyboardInterrupt in the main thread."""
    global _over
    before = _handle(signal.default_int_handler)
    hook = sys.unraisablehook
    sys.unraisablehook = _again(hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        _restore(before)
        _over = True


def _again(otherwise: Callable[[Any], Any]) -> Callable[[Any], None]:
    """What Python calls with an exception that it cannot raise: one in a destructor, or in another
    function that runs wherever the main thread happens to be. If it is what a signal has raised
    there, the signal comes once more, when that function has ended."""

    def unraisable(found: Any) -> None:
        if isinstance(found.exc_value, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            otherwise(found)

    return unraisable


def _ending(advice: str = "nothing was changed") -> Handler:
    def end(number: int, _: object) -> None:
        line = "interrupted" if _over else f"interrupted: {advice}"
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())
        if log is not None:
            log(line)
        os._exit(INTERRUPTED)

    return end


def _handle(handler: Handler) -> dict[signal.Signals, Any]:
    """Give both signals a handler; returns those that they had."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # Who ignores Ctrl-C, as a shell does for what it runs in the background, goes on doing so.
    found = {number: signal.getsignal(number) for number in SIGNALS}
    found = {number: had for number, had in found.items() if had is not signal.SIG_IGN}
    for number in found:
        signal.signal(number, handler)
    wake_the_main_thread()
    return found


def _restore(before: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            # None: something that was not installed from Python, and cannot be from there.
            if handler is not None:
                signal.signal(number, handler)
