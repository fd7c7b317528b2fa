"""A buffer that is reused for many tensors.

Getting new memory from the operating system costs as much time as filling it.
"""

from __future__ import annotations

import torch

_ALIGN = 64  # bytes of a cache line; this also aligns every dtype


class Arena:
    """One buffer from which :meth:`take` hands out pieces until :meth:`reset` frees them all.

    The buffer grows as needed. A piece must not be used after ``reset``. An arena is for one
    thread only.

    Args:
        nbytes: initial size of the buffer.
        pinned: whether the buffer is page-locked, so that a GPU can copy from and to it
            asynchronously (needs CUDA).
    """

    def __init__(self, nbytes: int = 0, pinned: bool = False) -> None:
        self._pinned = pinned
        self._buffer = self._allocate(nbytes)
        self._used = 0
        self._wanted = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """An uninitialised uint8 tensor of ``nbytes``."""
        start = self._used
        self._used += -(-nbytes // _ALIGN) * _ALIGN
        self._wanted = max(self._wanted, self._used)
        if self._used > len(self._buffer):
            # Pieces in use keep the old buffer alive. The next reset allocates one buffer that is
            # large enough for all.
            self._buffer = self._allocate(self._used)
            start, self._used = 0, -(-nbytes // _ALIGN) * _ALIGN
        return self._buffer[start : start + nbytes]

    def reset(self) -> None:
        """Free all pieces, and grow the buffer if they did not fit into it."""
        if self._wanted > len(self._buffer):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # free the old one before the new one
            self._buffer = self._allocate(self._wanted)
        self._used = self._wanted = 0

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
