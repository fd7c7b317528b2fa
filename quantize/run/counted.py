"""How many bytes of the source are done, where work may be lost: a disk that gets full loses shards
that were being made."""

from __future__ import annotations

from threading import Lock

from quantize.run.workers import Progress


class Counted:
    """Progress, of which what was lost is taken back.

    Args:
        progress: is told of it; of what is lost as of less than nothing.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self._lock = progress, 0, Lock()

    def __call__(self, nbytes: int, where: str = "", /) -> None:
        with self._lock:
            self._done += nbytes
        self._progress(nbytes, where)

    def begin_at(self, nbytes: int) -> None:
        """Say that so many bytes are done in all, and the rest is not."""
        if more := nbytes - self._done:
            self(more)
