"""Memory that is used again and again: getting it from the system costs as much as filling it."""

from __future__ import annotations

import torch

_ALIGN = 64  # a cache line: also every dtype's alignment


class Arena:
    """One growing buffer, cut into pieces until :meth:`reset`; then they are all reused.

    For one thread. Pieces are invalid after ``reset``.

    Args:
        nbytes: to begin with.
        pinned: page-locked, so that a GPU copies from and to it by itself (needs CUDA).
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
            # Pieces in use keep the old buffer alive; from the next reset on there is one again.
            self._buffer = self._allocate(self._used)
            start, self._used = 0, -(-nbytes // _ALIGN) * _ALIGN
        return self._buffer[start : start + nbytes]

    def reset(self) -> None:
        """All pieces are free again."""
        if self._wanted > len(self._buffer):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # freed before the larger one comes
            self._buffer = self._allocate(self._wanted)
        self._used = self._wanted = 0

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
