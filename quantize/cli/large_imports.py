"""Importing PyTorch, Transformers and what needs them, once a command is to do its work."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from quantize.cli.signals import ending_at_once


@contextmanager
def large_imports() -> Iterator[None]:
    """Within, large libraries are imported without the garbage collector.

    They make some hundred thousand objects that all stay. To look through them again and again
    takes a fifth of the time of the imports, and as much in each full collection of the
    command's own objects later; so they are also left out of those.

    Nothing is to be tidied up yet: Ctrl-C ends the process at once.
    """
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
