"""Every tile shape of the Hopper kernels, alone and without vLLM: which is the fastest for what.

    python -m benchmarks.hopper_tiles --build                     compile: a minute, without a GPU
    python -m benchmarks.hopper_tiles [--limit 170] [--out FILE]

Times are medians of replays of a CUDA graph, those of all tile shapes taking turns; a graph holds
up to 8 routings, so that one's weights are not in L2 for the next. In brackets is the share of the
floor, as in ``benchmarks.moe_layer``. All outputs must agree, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.moe_layer_table import MORE, SHAPES
from quantize.native import jit
from vllm_nvfp4_moe.doctor.inputs import Batch, apart, batch, batches, random_weights
from vllm_nvfp4_moe.doctor.shape import MINIMAX_M3, Shape, active_experts, floor
from vllm_nvfp4_moe.doctor.timing import time_on_gpu
from vllm_nvfp4_moe.kernels.hopper.kernel import ARCHITECTURE, Experts, expected_pairs
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

TOKENS = tuple(2**n for n in range(14))
DISTINCT = 8
"""Experts with weights of their own; the others have copies of them."""
FLOPS = {"bf16": 790.0, "fp8": 1580.0}
APART = {"bf16": 6e-3, "fp8": 3e-2}
"""From which two tile shapes' outputs are too far apart: they add up in other orders."""


@dataclass(frozen=True)
class Layer:
    """Experts of one rank of ``ranks`` with expert parallelism."""

    shape: Shape
    ranks: int = 1

    def __str__(self) -> str:
        parallel = f" ep{self.ranks}" if self.ranks > 1 else ""
        return self.shape.name + (f" tp{self.shape.tp}" if self.shape.tp > 1 else "") + parallel

    @property
    def experts(self) -> int:
        """That this rank has."""
        return self.shape.experts // self.ranks


MIXTRAL, SMALL = MORE["mixtral-8x7b"], MORE["small"]
QWEN3, DEEPSEEK = SHAPES["qwen3-235b"], SHAPES["deepseek-v3"]
LAYERS = [
    Layer(MINIMAX_M3),
    Layer(MIXTRAL),
    Layer(QWEN3),
    Layer(SMALL),
    Layer(MINIMAX_M3.slice(4)),
    Layer(QWEN3.slice(4)),
    Layer(QWEN3.slice(8)),
    Layer(DEEPSEEK, ranks=8),
    Layer(MIXTRAL.slice(4)),
]


@dataclass
class Point:
    """One layer, kernel and number of tokens.

    Attributes:
        floor: ms.
        chosen: the tile shape that ``choose_tile_shape`` says.
        ms: by tile shape.
    """

    layer: str
    kernel: str
    tokens: int
    floor: float
    chosen: str
    ms: dict[str, float]

    @property
    def lost(self) -> float:
        """How much longer the choice takes than the fastest, 0 for none."""
        return self.ms[self.chosen] / min(self.ms.values()) - 1

    def __str__(self) -> str:
        times = ", ".join(
            f"{name} {ms:.4f} ({self.floor / ms:.2f})" for name, ms in self.ms.items()
        )
        choice = f"chosen {self.chosen} ({100 * self.lost:+.1f} %)"
        return f"{self.kernel} {self.layer}, {self.tokens} tokens: {times}; {choice}"


def sensible(shape: TileShape, layer: Layer, tokens: int) -> bool:
    """Whether a tile shape may be the fastest."""
    each = tokens * layer.shape.top_k / layer.shape.experts  # tokens of an expert
    if shape.max_tokens == 8:
        return tokens * layer.shape.top_k <= 64 * layer.ranks
    if shape.max_tokens == 64:
        return each <= 128
    return each >= (12 if shape.max_tokens == 128 else 48)


class Bench:
    """One layer's weights, packed for one kernel."""

    def __init__(self, layer: Layer, name: str) -> None:
        self.layer, self.name, self.kernel = layer, name, KERNELS[name]
        self.device = torch.device("cuda", 0)
        self.generator = torch.Generator(self.device).manual_seed(0)
        shape = layer.shape
        few = Shape("few", min(DISTINCT, layer.experts), shape.hidden, shape.intermediate, 1)
        one = self.kernel.pack(*(part for m in random_weights(few, self.generator) for part in m))
        times = layer.experts // few.experts
        self.experts = Experts(
            one.w13.repeat(times, 1, 1, 1),
            one.w2.repeat(times, 1, 1, 1),
            one.global_scales13.repeat(times),
            one.global_scales2.repeat(times),
            one.hidden,
        )
        self.local = None
        if layer.ranks > 1:
            every = torch.arange(shape.experts, dtype=torch.int32, device=self.device)
            self.local = every.where(every < layer.experts, -1)

    def floor(self, given: Sequence[Batch]) -> float:
        """Milliseconds, in the mean."""
        here = [one.ids.where(one.ids < self.layer.experts, -1) for one in given]
        active = statistics.fmean(active_experts(ids) for ids in here)
        flops = FLOPS[self.name] * self.layer.ranks  # they share the tokens
        return floor(self.layer.shape, len(given[0].x), active, 4.3, flops).ms

    def call(self, shape: TileShape, given: Batch) -> torch.Tensor:
        return self.kernel.run(
            given.x, self.experts, given.ids, given.weights, self.layer.shape.gate,
            local=self.local, tile_shape=shape,
        )  # fmt: skip

    def measure(self, tokens: int, rounds: int) -> tuple[Point, list[str]]:
        """Times of each sensible tile shape, and what is wrong with outputs."""
        shape, count = self.layer.shape, self.layer.experts
        given = [batch(shape, tokens, False, self.generator) for _ in range(batches(tokens))]
        pairs = expected_pairs(given[0].ids, count, self.local)
        chosen = self.kernel.choose_tile_shape(pairs, count, self.experts.w13.shape[1])
        calls = {
            str(shape): partial(self.call, shape)
            for shape in self.kernel.tile_shapes
            if sensible(shape, self.layer, tokens)
        }
        outs = {name: call(given[0]) for name, call in calls.items()}
        first = next(iter(outs))
        errors = {name: apart(out, outs[first]) for name, out in outs.items()}
        wrong = [
            f"WRONG {self.layer} {self.name}, {tokens} tokens: {name} and {first} are "
            f"{error:.4f} apart"
            for name, error in errors.items()
            if not error < APART[self.name]
        ]
        graphs = {
            name: captured([partial(call, one) for one in given]) for name, call in calls.items()
        }
        found = time_on_gpu({name: graph.replay for name, graph in graphs.items()}, rounds + 1)
        # The first replay warms up.
        ms = {name: statistics.median(times[1:]) / len(given) for name, times in found.items()}
        floor_ms = self.floor(given)
        return Point(str(self.layer), self.name, tokens, floor_ms, str(chosen), ms), wrong


def captured(steps: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of the steps, one after another."""
    # Not `torch.cuda.graph`, which collects garbage and gives memory back each time.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for step in steps:
            step()
        graph.capture_end()
    return graph


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names = [str(layer) for layer in LAYERS]
    parser.add_argument("--layers", nargs="+", choices=names, default=names)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds to stop after")
    parser.add_argument("--out", type=Path, help="results in JSON, written after each layer")
    parser.add_argument("--build", action="store_true", help="compile, and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    begin = time.monotonic()
    args = parse(arguments)
    sources = [KERNELS[name].source() for name in args.kernels]
    with ThreadPoolExecutor(len(sources)) as pool:
        list(pool.map(lambda text: jit.load(text, jit.cuda(ARCHITECTURE)), sources))
    print(f"libraries ready after {time.monotonic() - begin:.0f} s", flush=True)
    if args.build:
        return 0
    print(torch.cuda.get_device_name(0), flush=True)
    points: list[Point] = []
    wrong: list[str] = []
    # All layers with one kernel before the next: what is decided first, should time run out.
    layers = [layer for layer in LAYERS if str(layer) in args.layers]
    for name, layer in product(args.kernels, layers):
        bench = None  # the last one's memory is free
        torch.cuda.empty_cache()
        for tokens in args.tokens:
            if time.monotonic() - begin > args.limit:
                print("stopped by --limit")
                break
            bench = bench or Bench(layer, name)
            point, problems = bench.measure(tokens, rounds=9)
            points.append(point)
            wrong += problems
            print("\n".join([str(point), *problems]), flush=True)
        if args.out:
            args.out.write_text(json.dumps([vars(point) for point in points], indent=1))
    for name in args.kernels:
        if lost := [1 + point.lost for point in points if point.kernel == name]:
            mean = statistics.geometric_mean(lost)
            print(f"{name}: the choice loses {100 * mean - 100:.2f} % in the mean")
    print("\n".join(wrong) or "VERDICT all outputs agree")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
