"""How long a layer's calls take: replays of CUDA graphs on a GPU, plain calls on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vllm_nvfp4_moe.doctor.inputs import Batch
from vllm_nvfp4_moe.doctor.layer import Layer

WARM = 3
"""Replays of each graph before the timed ones."""


class Pass:
    """A layer's calls with all batches: one CUDA graph; on a CPU they are made anew."""

    def __init__(self, layer: Layer, given: Sequence[Batch]) -> None:
        self.layer, self.given = layer, given
        self.graph: Any = None
        self._call()

    def capture(self) -> None:
        """Only after every other layer has been called with as many tokens: what vLLM's workspace
        was before it grew, the graph would still write to."""
        if self.given[0].x.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._call()

    def _call(self) -> None:
        self.outs = [self.layer(given) for given in self.given]

    def __call__(self) -> None:
        if self.graph is None:
            self._call()
        else:
            self.graph.replay()

    def last(self) -> torch.Tensor:
        """A copy of what it gives for the last batch."""
        self()
        return self.outs[-1].clone()


def time_on_gpu(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, which take turns; nothing is waited for in between."""
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record()
            call()
            end.record()
            marks[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [b.elapsed_time(e) for b, e in pairs] for name, pairs in marks.items()}


def time_on_cpu(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """The same."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - begin) * 1e3)
    return found
