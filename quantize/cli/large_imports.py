"""Importing PyTorch, Transformers and what needs them, once a command is to do its work."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from quantize.cli.signals import ending_at_once

WAITING = "OMP_WAIT_POLICY"
"""How OpenMP's threads wait for each other, in PyTorch's operations."""


@contextmanager
def large_imports(timed: bool = False) -> Iterator[None]:
    """Within, large libraries are imported without the garbage collector.

    They make some hundred thousand objects that all stay. To look through them again and again
    takes a fifth of the time of the imports, and as much in each full collection of the
    command's own objects later; so they are also left out of those.

    Nothing is to be tidied up yet: Ctrl-C ends the process at once.

    PyTorch's threads then sleep while they wait, unless the user says otherwise: OpenMP reads its
    variable once, when it is loaded. By default they spin for milliseconds, and rounding is
    thousands of short operations. Where something else has a core, each of these waits for a thread
    that is not running, behind one that spins: GPTQ of 1536 x 1024 took two threads 32 s beside
    other work, and 3.0 s if they sleep.

    Args:
        timed: what follows is timed as engines run it, so threads wait as they do there.
    """
    if not timed:
        os.environ.setdefault(WAITING, "passive")
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        with ending_at_once():
            yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # some libraries complain of what is not collected in the end
