"""Importing PyTorch, Transformers and what needs them, once a command is to do its work."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from quantize.cli.signals import ending_at_once

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""How OpenMP's threads wait for each other, in PyTorch's operations. The first is that of GNU's
OpenMP, which PyTorch's wheels have: how often a thread looks before it sleeps."""

SPINS = 10_000
"""Some tens of microseconds. By default it is 300,000."""


@contextmanager
def large_imports(timed: bool = False) -> Iterator[None]:
    """Within, large libraries are imported without the garbage collector.

    They make some hundred thousand objects that all stay. To look through them again and again
    takes a fifth of the time of the imports, and as much in each full collection of the
    command's own objects later; so they are also left out of those.

    Nothing is to be tidied up yet: Ctrl-C ends the process at once.

    PyTorch's threads then sleep when they have waited for a moment, unless the user says how:
    OpenMP reads its variables once, when it is loaded. By default they look for milliseconds, and
    rounding is thousands of short operations. Where something else has a core, or a container may
    use fewer cores than it sees, each of these waits for a thread that is not running, behind one
    that spins. GPTQ of a layer of m3-nano, two threads on two cores, start included: alone 10.7 s
    with either, and 14.4 s if they never look; beside two other busy processes 45, 24 and 21 s.

    Args:
        timed: what follows is timed as engines run it, so threads wait as they do there.
    """
    if not timed and not any(name in os.environ for name in WAITING):
        os.environ[WAITING[0]] = str(SPINS)
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
