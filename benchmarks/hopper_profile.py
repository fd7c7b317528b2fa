"""What bounds the bf16 Hopper kernel: its launches' timeline, and its times with parts taken out.

    python -m benchmarks.hopper_profile --build                      compile: no GPU is needed
    python -m benchmarks.hopper_profile [few] [many]                 the tables

``few``: 1 to 8 tokens; ``many``: 512 to 2048, of small experts 256 to 2048. A timeline is of one
call after another in a CUDA graph: when each launch's CTAs begin, have waited for the launch
before, have their first stage, have issued their last copy of weights, and end; microseconds since
the call's first instruction by the GPU's clock, medians over calls of the least, the middle and the
last CTA. Ablations take a part out of the source (``hopper_variants.py``); their outputs are wrong,
and their times are medians of replays that take turns.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from benchmarks.hopper_tiles import MIXTRAL, QWEN3, SMALL, captured
from benchmarks.hopper_variants import (
    CTAS,
    EVENTS,
    FEW_SHAPES,
    KERNEL_NAMES,
    MANY_SHAPES,
    Variant,
    variants,
)
from vllm_nvfp4_moe.doctor.inputs import Batch, batch, batches, random_weights
from vllm_nvfp4_moe.doctor.shape import MINIMAX_M3, Shape, active_experts, floor
from vllm_nvfp4_moe.doctor.timing import time_on_gpu
from vllm_nvfp4_moe.kernels.hopper.bf16 import Bf16Kernel
from vllm_nvfp4_moe.kernels.hopper.kernel import Experts
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.source import ORDINARY

BANDWIDTH, FLOPS = 4.3, 790.0
CALLS = 12
"""Of which a timeline is the median."""


class Weights:
    """A layer's packed weights: few experts' random ones, repeated."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.generator = torch.Generator("cuda").manual_seed(0)
        few = replace(shape, experts=min(8, shape.experts))
        kernel = Variant(FEW_SHAPES, ())
        one = kernel.pack(*(part for m in random_weights(few, self.generator) for part in m))
        times = shape.experts // few.experts
        self.experts = Experts(
            one.w13.repeat(times, 1, 1, 1), one.w2.repeat(times, 1, 1, 1),
            one.global_scales13.repeat(times), one.global_scales2.repeat(times), one.hidden,
        )  # fmt: skip

    def batches(self, tokens: int) -> list[Batch]:
        return [batch(self.shape, tokens, False, self.generator) for _ in range(batches(tokens))]

    def call(self, kernel: Variant, tile_shape: TileShape, given: Batch) -> torch.Tensor:
        return kernel.run(given.x, self.experts, given.ids, given.weights, self.shape.gate,
                          tile_shape=tile_shape)  # fmt: skip

    def floor(self, given: Sequence[Batch]) -> float:
        """Microseconds."""
        active = statistics.fmean(active_experts(one.ids) for one in given)
        return 1e3 * floor(self.shape, len(given[0].x), active, BANDWIDTH, FLOPS).ms

    def times(self, kernels: Mapping[str, Variant], shape: TileShape, given: Sequence[Batch],
              rounds: int) -> dict[str, float]:  # fmt: skip
        """Microseconds of a call, replays taking turns."""
        graphs = {}
        for name, kernel in kernels.items():
            self.call(kernel, shape, given[0])
            graphs[name] = captured([partial(self.call, kernel, shape, one) for one in given])
        found = time_on_gpu({name: g.replay for name, g in graphs.items()}, rounds + 2)
        return {name: 1e3 * statistics.median(ms[2:]) / len(given) for name, ms in found.items()}


def timeline(weights: Weights, kernel: Variant, shape: TileShape, given: Sequence[Batch]) -> str:
    """The table of one call's launches."""
    library = kernel.library(0, ORDINARY)
    buffer = (ctypes.c_ulonglong * (5 * 5 * CTAS))()
    weights.call(kernel, shape, given[0])
    graph = captured([partial(weights.call, kernel, shape, one) for one in given])
    rows: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    for number in range(CALLS):
        library.read_stamps(buffer, 1)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        library.read_stamps(buffer, 0)
        stamps = torch.tensor(list(buffer), dtype=torch.int64).view(5, 5, CTAS)
        begin = int(stamps[0, 0, 0])
        if number == 0:
            continue
        for i in range(5):
            for j in range(5):
                here = stamps[i, j][stamps[i, j] >= begin]
                if len(here):
                    us = (here - begin).double() / 1e3
                    rows.setdefault((i, j), []).append(
                        (float(us.min()), float(us.median()), float(us.max()))
                    )
    lines = []
    for i, name in enumerate(KERNEL_NAMES):
        cells = []
        for j, event in enumerate(EVENTS):
            if (i, j) in rows:
                least, middle, last = (statistics.median(v) for v in zip(*rows[i, j], strict=True))
                cells.append(f"{event} {least:.1f} {middle:.1f} {last:.1f}")
        lines.append(f"    {name:8} " + " | ".join(cells))
    return "\n".join(lines)


FEW_POINTS = ((MINIMAX_M3, (1, 2, 4, 8)), (MIXTRAL, (1, 2, 8)), (QWEN3, (1, 4)))
MANY_POINTS = ((MINIMAX_M3, (512, 1024, 2048)), (SMALL, (256, 512, 2048)))


def chosen(weights: Weights, kind: str, tokens: int) -> list[TileShape]:
    shape = weights.shape
    kernel = Bf16Kernel()
    choice = kernel.choose_tile_shape(
        tokens * shape.top_k, shape.experts, weights.experts.w13.shape[1]
    )
    if kind == "few":
        return [choice, *(one for one in FEW_SHAPES if one != choice)]
    assert choice in MANY_SHAPES
    return [choice]


def profile(kind: str, deadline: float) -> None:
    made = {name: v for (k, name), v in variants([kind]).items() if k == kind}
    ablated = {name: v for name, v in made.items() if name != "timeline"}
    for shape, counts in FEW_POINTS if kind == "few" else MANY_POINTS:
        weights = Weights(shape)
        for tokens in counts:
            given = weights.batches(tokens)
            floor_us = weights.floor(given)
            for tile_shape in chosen(weights, kind, tokens):
                if time.monotonic() > deadline:
                    print("stopped: no time is left")
                    return
                found = weights.times(ablated, tile_shape, given, 7)
                cells = ", ".join(f"{name} {us:.1f}" for name, us in found.items())
                print(f"{shape.name} {tokens} tokens {tile_shape}, floor {floor_us:.1f}: {cells}")
                print(timeline(weights, made["timeline"], tile_shape, given), flush=True)
        del weights
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["few", "many"])
    parser.add_argument("--build", action="store_true", help="compile, and stop")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds to stop after")
    args = parser.parse_args()
    begin = time.monotonic()
    made = variants(args.what)
    with ThreadPoolExecutor(2 if args.build else 16) as pool:
        list(pool.map(Variant.compile, made.values()))
    print(f"{len(made)} libraries ready after {time.monotonic() - begin:.0f} s", flush=True)
    if args.build:
        return 0
    print(torch.cuda.get_device_name(0), flush=True)
    for kind in args.what:
        profile(kind, begin + args.limit)
    print(f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
