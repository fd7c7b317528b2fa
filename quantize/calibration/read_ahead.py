"""Experts' weights, each read while the one before is being used.

On a GPU the host has little else to do meanwhile: of 0.36 s that an expert of MiniMax-M3 took an
H200 with ``gptq``, 0.14 were the GPU's own work. On a CPU all cores are at work anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

from quantize.calibration.expert_weights import ExpertWeights

T = TypeVar("T")


def experts_in_order(
    read: Callable[[int], ExpertWeights], count: int, device: torch.device
) -> Generator[ExpertWeights, None, None]:
    """Yield ``read(0)``, ``read(1)`` and so on, whose weights are on ``device``.

    On a GPU, one more expert's weights are there while one is used.

    Raises:
        whatever ``read`` raises, when it is that expert's turn.
    """
    if device.type != "cuda":
        yield from map(read, range(count))
        return
    copies = _copies(device)

    def copied(number: int) -> ExpertWeights:
        with torch.cuda.stream(copies):
            weights = read(number)
        copies.synchronize()
        return weights

    for weights in read_ahead(copied, count):
        # Their memory is not to be used again before this stream is done with it.
        weights.record_stream(torch.cuda.current_stream(device))
        yield weights


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """A stream beside that of the work, for which a copy there would wait. One for all layers:
    memory that a stream has freed is there for that stream alone."""
    return torch.cuda.Stream(device)


def read_ahead(read: Callable[[int], T], count: int) -> Generator[T, None, None]:
    """Yield ``read(0)`` to ``read(count - 1)``, read in that order by one thread, one ahead."""
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        following = reader.submit(read, 0) if count else None
        for number in range(1, count + 1):
            assert following is not None
            found = following.result()
            following = reader.submit(read, number) if number < count else None
            yield found
