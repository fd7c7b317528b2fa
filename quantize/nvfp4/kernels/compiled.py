"""numba's compiler, with a cache on disk where there is a place for one.

numba looks for a writable folder when a function is decorated, and raises if it finds none, as in
containers with a read-only file system and a user of their own. It writes the cache at the first
call, and raises if the disk is full, or if what it finds there is damaged. None of this is a reason
not to run: without a cache, functions are compiled in each process.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit


def compiled(**options: Any) -> Any:
    """A decorator: compile the function at its first call, and keep the result for later processes.

    Args:
        options: of ``numba.njit``.
    """

    def decorate(function: Any) -> Any:
        if not _has_a_place(function):
            return njit(**options)(function)
        try:
            dispatcher = njit(**options, cache=True)(function)
        except (RuntimeError, OSError):
            return njit(**options)(function)
        cache = dispatcher._cache
        cache.load_overload = _unless_it_fails(cache.load_overload)
        cache.save_overload = _unless_it_fails(cache.save_overload)
        return dispatcher

    return decorate


def _has_a_place(function: Any) -> bool:
    """Whether numba's own rule leads to a folder. Where there is no home directory, it would make
    a folder named ``~``."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return True
    with suppress(RuntimeError):
        return Path.home().is_absolute()
    folder = Path(function.__code__.co_filename).parent
    cache = folder / "__pycache__"
    return os.access(cache if cache.exists() else folder, os.W_OK)


def _unless_it_fails(method: Any) -> Any:
    def call(*args: Any) -> Any:
        try:
            return method(*args)
        except Exception:  # damaged files raise whatever reading them runs into
            return None

    return call
