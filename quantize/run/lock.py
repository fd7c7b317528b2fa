"""One run a target: a lock that goes with its process, however that ends.

It is ``flock`` on a file in the record's folder, which network file systems pass on to the other
machines (NFS since Linux 2.6.12). Where a file system has no locks, runs are told apart by their
record alone (``Record.check_ours``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantize.checkpoint.disk import cannot_be_written
from quantize.errors import QuantizeError

LOCK = "lock"
"""The file's name."""

_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_TRIES, _PAUSE = 3, 0.1
"""Another process may hold the lock for a moment, only to see whether it is free."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock in ``folder``, the record's, which is made if it is not there.

    Where no run was begun in the context, what this has made goes again.

    Raises:
        QuantizeError: if another process holds it, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, made = _acquire(folder)
    except OSError as error:
        raise cannot_be_written(folder.parent, "DST", error) from error
    try:
        yield
    finally:
        if made and not (folder / "run.json").exists():
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
        os.close(descriptor)


def check_unlocked(folder: Path) -> None:
    """Raise QuantizeError if a process holds the lock in ``folder``; nothing is changed."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        _lock(folder, descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _acquire(folder: Path) -> tuple[int, bool]:
    """The lock's descriptor, and whether its file is new."""
    while True:
        folder.mkdir(exist_ok=True)
        made = not os.path.lexists(folder / LOCK)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _lock(folder, descriptor, fcntl.LOCK_EX)
            # Whoever held it before may have removed the file meanwhile: then it locks nothing.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(folder / LOCK)):
                    return descriptor, made
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(folder: Path, descriptor: int, kind: int) -> None:
    for attempt in range(_TRIES):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt + 1 < _TRIES:
                time.sleep(_PAUSE)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                return
            raise
    raise QuantizeError(
        f"{folder.parent}: another run is at work in it; wait until it has ended, or choose "
        "another folder"
    )
