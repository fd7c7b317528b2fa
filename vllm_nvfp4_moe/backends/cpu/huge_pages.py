"""Huge pages for weights: walking through 4 KB pages costs a CPU a fifth of the memory's speed."""

from __future__ import annotations

import ctypes
import mmap

import torch

_SIZE = 2 << 20
"""Bytes of a huge page on x86."""


def advise(tensor: torch.Tensor) -> bool:
    """Ask Linux to back the memory of ``tensor`` by huge pages, before anything is written there.

    Returns:
        Whether it was asked: there is at least one whole page, and the kernel has them.
    """
    begin = -(-tensor.data_ptr() // _SIZE) * _SIZE
    end = (tensor.data_ptr() + tensor.nbytes) // _SIZE * _SIZE
    if end <= begin or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    madvise = ctypes.CDLL(None).madvise
    return madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE) == 0
