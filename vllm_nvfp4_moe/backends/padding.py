"""Padding only what needs it while Humming converts a layer (``quirks.NEEDLESS_PADDING``)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from vllm_nvfp4_moe import quirks


class _Padding(threading.local):
    """How often this thread is within :func:`pad_only_what_needs_it`, and how many threads are."""

    depth = 0
    lock = threading.Lock()
    threads = 0


_padding = _Padding()


@contextmanager
def pad_only_what_needs_it() -> Iterator[None]:
    """Within, ``torch.nn.functional.pad`` returns a tensor that needs no padding as it is, if it
    is contiguous, and else a contiguous copy. Other threads see no change, and several may be
    within at once."""
    quirks.NEEDLESS_PADDING.log()
    functional: Any = torch.nn.functional
    with _Padding.lock:
        if not _Padding.threads:
            functional.pad = _lazily(functional.pad)
        _Padding.threads += 1
    _padding.depth += 1
    try:
        yield
    finally:
        _padding.depth -= 1
        with _Padding.lock:
            _Padding.threads -= 1
            if not _Padding.threads:
                functional.pad = functional.pad.__wrapped__


def _lazily(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(original)
    def pad(
        input: torch.Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> torch.Tensor:
        if _padding.depth and not any(pad):
            return input.contiguous()
        return original(input, list(pad), mode, value)

    return pad
