"""Every tile shape of the Hopper kernels, alone and without vLLM: which is the fastest for what.

    python -m benchmarks.hopper_tiles --build                     compile, which needs no GPU
    python -m benchmarks.hopper_tiles [--limit 170] [--out FILE]
    python -m benchmarks.hopper_tiles --beside [--out FILE]       while others take multiprocessors
    python -m benchmarks.hopper_tiles --propose FILE ...          tables of saved runs

Times are medians of replays of a CUDA graph, those of all tile shapes taking turns; a graph holds
up to 8 routings, so that one's weights are not in L2 for the next. A name with ``+`` is the same
shape with tiles that are taken by a counter (``TILES_BY_COUNTER`` in gemm.cuh) instead of dealt
out; its output must be the same to the last bit, and all outputs must agree, or the exit code is 1.

The floor is as in ``benchmarks.moe_layer``. ``--beside`` times each call alone, beside a shared
expert in bf16 on another stream (``shared``), and beside a kernel that holds ``--held``
multiprocessors for as long as the call takes alone (``held``).

Compiling takes a minute or two a library: ``--build`` fills ``$NVFP4_MOE_CACHE`` before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.hopper_tiles_table import Point, report
from quantize.native import jit
from vllm_nvfp4_moe.doctor.inputs import Batch, apart, batch, batches, random_weights
from vllm_nvfp4_moe.doctor.shape import BYTES, MINIMAX_M3, Shape
from vllm_nvfp4_moe.kernels.hopper.kernel import ARCHITECTURE, Experts, HopperKernel, expected_pairs
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.hopper.source import ORDINARY, Form

TOKENS = tuple(2**n for n in range(14))
BESIDE = (1, 4, 16, 64, 256)
"""Tokens with which vLLM runs shared experts on a second stream."""
DISTINCT = 8
"""Experts with weights of their own; the others have copies of them."""
FLOPS = {"bf16": 790.0, "fp8": 1580.0}
APART = {"bf16": 6e-3, "fp8": 3e-2}
"""From which two tile shapes' outputs are too far apart: they add up in other orders."""
DEALT, COUNTED = "", "+"
"""What a variant adds to a tile shape's name."""


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


MIXTRAL = Shape("mixtral-8x7b", 8, 4096, 14336, 2)
QWEN3 = Shape("qwen3-235b", 128, 4096, 1536, 8)
LAYERS = [
    Layer(MINIMAX_M3),
    Layer(MIXTRAL),
    Layer(QWEN3),
    Layer(Shape("small", 64, 2048, 1024, 8)),
    Layer(MINIMAX_M3.slice(4)),
    Layer(QWEN3.slice(4)),
    Layer(Shape("deepseek-v3", 256, 7168, 2048, 8), ranks=8),
    Layer(MIXTRAL.slice(4)),
]


def variant(name: str, counted: bool) -> HopperKernel:
    """A kernel of its own whose tiles are taken by a counter, or dealt out."""
    kernel = type(KERNELS[name])()
    given = kernel.source
    constant = f"TILES_BY_COUNTER = {str(counted).lower()};"

    def source(form: Form = ORDINARY) -> str:
        text, count = re.subn(r"TILES_BY_COUNTER = \w+;", constant, given(form))
        assert count == 1, "gemm.cuh says once whether tiles are taken by a counter"
        return text

    kernel.__dict__["source"] = source  # before the class's
    return kernel


HOLD = """
#include <cuda_runtime.h>
__global__ void hold(long long nanoseconds) {
    long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - begin < nanoseconds);
}
extern "C" __attribute__((visibility("default"))) int run(int count, long long nanoseconds,
                                                          cudaStream_t stream) {
    constexpr int SHARED = 200 * 1024;  // so that no GEMM's CTA fits beside it
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const int error = cudaFuncSetAttribute(hold, attribute, SHARED);
    if (error) return error;
    hold<<<count, 32, SHARED, stream>>>(nanoseconds);
    return cudaGetLastError();
}
"""


def build(kernels: Iterable[HopperKernel]) -> ctypes.CDLL:
    """Compile all that is not in the cache. Give the library that holds multiprocessors."""
    sources = [HOLD, *(kernel.source() for kernel in kernels)]
    with ThreadPoolExecutor(len(sources)) as pool:
        libraries = list(pool.map(lambda text: jit.load(text, jit.cuda(ARCHITECTURE)), sources))
    hold = libraries[0]
    hold.run.argtypes = [ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p]
    return hold


def sensible(shape: TileShape, layer: Layer, tokens: int) -> bool:
    """Whether a tile shape may be the fastest."""
    each = tokens * layer.shape.top_k / layer.shape.experts  # tokens of an expert
    if shape.max_tokens == 8:
        return tokens * layer.shape.top_k <= 64 * layer.ranks
    if shape.max_tokens == 64:
        return each <= 128
    return each >= (12 if shape.max_tokens == 128 else 48)


class Bench:
    """One layer's weights, packed for one kernel, and its variants by what they add to a name."""

    def __init__(self, layer: Layer, name: str, variants: Mapping[str, HopperKernel]) -> None:
        self.layer, self.name, self.variants = layer, name, variants
        self.device = torch.device("cuda", 0)
        self.generator = torch.Generator(self.device).manual_seed(0)
        few = Shape("few", min(DISTINCT, layer.experts), *self.sizes, layer.shape.top_k)
        kernel = next(iter(variants.values()))
        one = kernel.pack(*(part for m in random_weights(few, self.generator) for part in m))
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
            every = torch.arange(layer.shape.experts, dtype=torch.int32, device=self.device)
            self.local = every.where(every < layer.experts, -1)
        self.processors = torch.cuda.get_device_properties(self.device).multi_processor_count

    @property
    def sizes(self) -> tuple[int, int]:
        return self.layer.shape.hidden, self.layer.shape.intermediate

    def batches(self, tokens: int) -> list[Batch]:
        shape = self.layer.shape
        return [batch(shape, tokens, False, self.generator) for _ in range(batches(tokens))]

    def point(self, tokens: int, given: Sequence[Batch]) -> Point:
        """All but the times."""
        shape, local = self.layer.shape, self.layer.experts
        ids = [one.ids[(one.ids >= 0) & (one.ids < local)] for one in given]
        active = statistics.fmean(int(one.unique().numel()) for one in ids)
        computed = 2 * statistics.fmean(one.numel() for one in ids) * shape.weights
        pairs = expected_pairs(given[0].ids, local, self.local)
        row_tiles = self.experts.w13.shape[1]
        kernel = next(iter(self.variants.values()))
        return Point(
            layer=str(self.layer),
            kernel=self.name,
            tokens=tokens,
            floor=max(active * shape.weights * BYTES / 4.3, computed / FLOPS[self.name]) / 1e9,
            each=pairs / local,
            rows=pairs * row_tiles / self.processors,
            chosen=str(kernel.choose_tile_shape(pairs, local, row_tiles, self.processors)),
            ms={},
        )

    def call(self, kernel: HopperKernel, shape: TileShape, given: Batch) -> torch.Tensor:
        return kernel.run(
            given.x, self.experts, given.ids, given.weights, self.layer.shape.gate,
            local=self.local, tile_shape=shape,
        )  # fmt: skip

    def calls(self, tokens: int) -> dict[str, Callable[[Batch], torch.Tensor]]:
        return {
            f"{shape}{mark}": partial(self.call, kernel, shape)
            for mark, kernel in self.variants.items()
            for shape in kernel.tile_shapes
            # `BY_COUNTER` in gemm.cuh: the others' code is the same.
            if sensible(shape, self.layer, tokens) and (mark == DEALT or shape.max_tokens == 64)
        }

    def problems(self, outs: Mapping[str, torch.Tensor]) -> list[str]:
        """What is wrong with outputs of one batch, by the calls' names."""
        first = next(iter(outs))
        found = []
        for name, out in outs.items():
            if not (error := apart(out, outs[first])) < APART[self.name]:
                found.append(f"{name} and {first} are {error:.4f} apart")
            dealt = name.removesuffix(COUNTED)
            if dealt in outs and not torch.equal(out, outs[dealt]):
                found.append(f"{name} and {dealt} differ")
        return found


Step = Callable[[], Any]


def captured(steps: Sequence[Step], beside: Sequence[Step] | None = None) -> torch.cuda.CUDAGraph:
    """A graph of the steps, one after another, and of what runs beside each."""
    # Not `torch.cuda.graph`, which collects garbage and gives memory back each time.
    graph, main, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(main):
        graph.capture_begin()
        for number, step in enumerate(steps):
            if beside is not None:
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    beside[number]()
            step()
            if beside is not None:
                main.wait_stream(side)
        graph.capture_end()
    return graph


def timed(graphs: Mapping[str, torch.cuda.CUDAGraph], calls: int, rounds: int) -> dict[str, float]:
    """Medians of replays, in ms a call; the graphs take turns."""
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in graphs}
    for number in range(rounds + 1):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record()
            graph.replay()
            end.record()
            if number:  # the first warms up
                marks[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(b.elapsed_time(e) for b, e in pairs) / calls
        for name, pairs in marks.items()
    }


def measure(bench: Bench, tokens: int, rounds: int) -> tuple[Point, list[str]]:
    """Each tile shape alone."""
    given = bench.batches(tokens)
    point, calls = bench.point(tokens, given), bench.calls(tokens)
    problems = bench.problems({name: call(given[0]) for name, call in calls.items()})
    graphs = {name: captured([partial(call, one) for one in given]) for name, call in calls.items()}
    point.ms.update(timed(graphs, len(given), rounds))
    return point, problems


def measure_beside(
    bench: Bench, tokens: int, rounds: int, hold: ctypes.CDLL, held: int
) -> tuple[Point, list[str]]:
    """Each tile shape alone, beside a shared expert, and while multiprocessors are held."""
    point, problems = measure(bench, tokens, rounds)
    given, calls = bench.batches(tokens), bench.calls(tokens)
    hidden, intermediate = bench.sizes
    up, down = (
        torch.randn(*size, device=bench.device, generator=bench.generator).bfloat16()
        for size in ((hidden, 2 * intermediate), (intermediate, hidden))
    )
    shortest = min(point.ms.values())

    def shared(one: Batch) -> None:
        both = one.x @ up
        (both[:, :intermediate] * both[:, intermediate:]) @ down

    def holding(_: Batch) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        if error := hold.run(held, int(shortest * 1e6), stream):
            raise RuntimeError(f"CUDA error {error} of the kernel that holds multiprocessors")

    others: dict[str, Callable[[Batch], None]] = {"shared": shared, "held": holding}
    for other in others.values():  # libraries prepare what they cannot while a graph is made
        other(given[0])
    graphs = {
        f"{name} {what}": captured(
            [partial(call, one) for one in given], [partial(other, one) for one in given]
        )
        for name, call in calls.items()
        for what, other in others.items()
    }
    graphs |= {what: captured([partial(o, one) for one in given]) for what, o in others.items()}
    times = timed(graphs, len(given), rounds)
    point.beside.update({what: times.pop(what) for what in others})
    point.beside.update(times)
    return point, problems


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [str(layer) for layer in LAYERS]
    parser.add_argument("--layers", nargs="+", choices=names, default=names)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--dealt", action="store_true", help="no tiles by a counter")
    parser.add_argument("--beside", action="store_true", help="while others take multiprocessors")
    parser.add_argument("--held", type=int, default=16, help="multiprocessors, with --beside")
    parser.add_argument("--rounds", type=int, default=9, help="timed replays")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds to stop after")
    parser.add_argument("--out", type=Path, help="results in JSON, written after each layer")
    parser.add_argument("--build", action="store_true", help="compile, and stop")
    parser.add_argument("--propose", nargs="+", type=Path, help="tables of saved runs, and stop")
    args = parser.parse_args(arguments)
    args.tokens = args.tokens or (BESIDE if args.beside else TOKENS)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    deadline = time.monotonic()
    args = parse(arguments)
    deadline += args.limit
    if args.propose:
        saved = [Point(**one) for file in args.propose for one in json.loads(file.read_text())]
        print(report(saved))
        return 0
    marks = (DEALT,) if args.dealt else (DEALT, COUNTED)
    variants = {
        name: {mark: variant(name, mark == COUNTED) for mark in marks} for name in args.kernels
    }
    begin = time.monotonic()
    hold = build(kernel for some in variants.values() for kernel in some.values())
    print(f"libraries ready after {time.monotonic() - begin:.0f} s", flush=True)
    if args.build:
        return 0
    print(torch.cuda.get_device_name(0), flush=True)
    points: list[Point] = []
    wrong: list[str] = []
    # All layers with one kernel before the next: what is decided first, should time run out.
    jobs = [(name, x) for name in args.kernels for x in LAYERS if str(x) in args.layers]
    for name, layer in jobs:
        if time.monotonic() > deadline:
            break
        bench = Bench(layer, name, variants[name])
        for tokens in args.tokens:
            if time.monotonic() > deadline:
                break
            if args.beside:
                point, problems = measure_beside(bench, tokens, args.rounds, hold, args.held)
            else:
                point, problems = measure(bench, tokens, args.rounds)
            points.append(point)
            print(point, flush=True)
            for problem in problems:
                wrong.append(f"WRONG {layer} {name}, {tokens} tokens: {problem}")
                print(wrong[-1], flush=True)
        del bench
        torch.cuda.empty_cache()
        if args.out:
            new = args.out.with_name(args.out.name + ".new")
            new.write_text(json.dumps([vars(point) for point in points], indent=1))
            new.replace(args.out)
    print(report(points))
    if time.monotonic() > deadline:
        print("stopped by --limit")
    print("\n".join(wrong) or "VERDICT all outputs agree")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
