"""Several versions of the Hopper kernels' sources in one run: do they agree, and which is faster?

    python -m benchmarks.hopper_ab DIRECTORY... --build              compile: no GPU is needed
    python -m benchmarks.hopper_ab DIRECTORY... [--kernels bf16] [--limit 200] [--out FILE]

A directory has ``bf16.cu``, ``fp8.cu`` and their headers, as ``vllm_nvfp4_moe/kernels/hopper``;
the Python side, tile shapes above all, is this checkout's. Replays of CUDA graphs take turns; times
are medians, in microseconds, each with its share of the floor and its ratio to the first
directory's. Outputs of one tile shape must be the first directory's to the last bit, or the exit
code is 1.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.hopper_tiles import LAYERS, Bench, Layer, captured
from quantize.native import jit
from vllm_nvfp4_moe.doctor.inputs import batch, batches
from vllm_nvfp4_moe.doctor.timing import time_on_gpu
from vllm_nvfp4_moe.kernels.hopper.kernel import ARCHITECTURE, HopperKernel, expected_pairs
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape, check, check_library
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.hopper.source import ORDINARY, Form

FEW = (1, 2, 4, 8)
COUNTS: dict[str, tuple[int, ...]] = {
    "minimax-m3": (1, 2, 4, 8, 16, 64, 256, 512, 1024, 2048, 8192),
    "mixtral-8x7b": (1, 2, 4, 8, 64, 1024),
    "qwen3-235b": (1, 2, 4, 8, 32, 512, 4096),
    "small": (1, 4, 16, 256, 2048),
    "minimax-m3 tp4": (1, 2, 8, 64, 1024),
    "qwen3-235b tp8": (1, 4, 16, 64, 256, 1024, 8192),
    "deepseek-v3 ep8": (1, 8, 64, 1024),
}
"""Tokens of each layer, by its name."""


def version(name: str, directory: Path) -> HopperKernel:
    """The kernel ``name`` with the source of a directory."""
    kernel = type(KERNELS[name])()
    kernel.file = directory / KERNELS[name].file.name
    return kernel


def loaded(kernel: HopperKernel, device: int, form: Form) -> ctypes.CDLL:
    library = jit.load(kernel.source(form), jit.cuda(ARCHITECTURE))
    check_library(library, kernel.tile_shapes)
    check(library, library.prepare())
    return library


class Versions:
    """One layer's weights and all versions of a kernel."""

    def __init__(self, layer: Layer, name: str, kernels: dict[str, HopperKernel]) -> None:
        self.bench = Bench(layer, name)
        self.kernels = kernels

    def call(self, name: str, shape: TileShape, given: Any) -> torch.Tensor:
        bench = self.bench
        return self.kernels[name].run(
            given.x, bench.experts, given.ids, given.weights, bench.layer.shape.gate,
            local=bench.local, tile_shape=shape,
        )  # fmt: skip

    def shapes(self, tokens: int, ids: torch.Tensor) -> list[TileShape]:
        """The one that is chosen, and for few tokens the other that might be."""
        bench = self.bench
        pairs = expected_pairs(ids, bench.layer.experts, bench.local)
        chosen = bench.kernel.choose_tile_shape(
            pairs, bench.layer.experts, bench.experts.w13.shape[1]
        )
        small = (shape for shape in bench.kernel.tile_shapes if shape.max_tokens <= 64)
        return [chosen, *(shape for shape in small if tokens in FEW and shape != chosen)]

    def measure(self, tokens: int, rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Points, and what is wrong."""
        bench, points, wrong = self.bench, [], []
        given = [
            batch(bench.layer.shape, tokens, False, bench.generator) for _ in range(batches(tokens))
        ]
        floor_us = 1e3 * bench.floor(given)
        for shape in self.shapes(tokens, given[0].ids):
            outs = {name: [self.call(name, shape, one) for one in given] for name in self.kernels}
            first = next(iter(outs))
            for name, some in outs.items():
                for number, (one, other) in enumerate(zip(some, outs[first], strict=True)):
                    if not torch.equal(one, other):
                        rows = int((one != other).any(1).sum())
                        wrong.append(
                            f"WRONG {bench.layer} {bench.name}, {tokens} tokens, {shape}: {name} "
                            f"and {first} differ in {rows} rows of batch {number}"
                        )
            graphs = {
                name: captured([partial(self.call, name, shape, one) for one in given])
                for name in self.kernels
            }
            found = time_on_gpu({name: g.replay for name, g in graphs.items()}, rounds + 2)
            us = {name: 1e3 * statistics.median(ms[2:]) / len(given) for name, ms in found.items()}
            points.append(
                {"layer": str(bench.layer), "kernel": bench.name, "tokens": tokens,
                 "shape": str(shape), "floor": floor_us, "us": us}
            )  # fmt: skip
        return points, wrong


def said(point: dict[str, Any]) -> str:
    first = next(iter(point["us"].values()))
    cells = ", ".join(
        f"{name} {us:.1f} ({point['floor'] / us:.2f}, {us / first:.3f})"
        for name, us in point["us"].items()
    )
    return (
        f"{point['kernel']} {point['layer']} {point['tokens']:5} tokens {point['shape']:8}"
        f" floor {point['floor']:.1f}: {cells}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--layers", nargs="+", choices=list(COUNTS), default=list(COUNTS))
    parser.add_argument("--tokens", nargs="+", type=int, help="instead of each layer's own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds to stop after")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--build", action="store_true", help="compile, and stop")
    args = parser.parse_args()
    names = [path.name for path in args.directories]
    if len(set(names)) < len(names):
        parser.error(f"told apart by their last names, of which two are alike: {names}")
    begin = time.monotonic()
    versions = {
        name: {path.name: version(name, path) for path in args.directories} for name in args.kernels
    }
    every = [kernel for kernels in versions.values() for kernel in kernels.values()]
    with ThreadPoolExecutor(2 if args.build else 16) as pool:
        list(pool.map(lambda one: jit.load(one.source(), jit.cuda(ARCHITECTURE)), every))
    print(f"{len(every)} libraries ready after {time.monotonic() - begin:.0f} s", flush=True)
    if args.build:
        return 0
    for kernel in every:
        kernel._libraries[0, ORDINARY] = loaded(kernel, 0, ORDINARY)
    print(torch.cuda.get_device_name(0), flush=True)
    points: list[dict[str, Any]] = []
    wrong: list[str] = []
    for name in args.kernels:
        for layer in (one for one in LAYERS if str(one) in args.layers):
            bench = None  # the last one's memory is free
            torch.cuda.empty_cache()
            for tokens in args.tokens or COUNTS[str(layer)]:
                if time.monotonic() - begin > args.limit:
                    print("stopped by --limit")
                    break
                bench = bench or Versions(layer, name, versions[name])
                found, problems = bench.measure(tokens, args.rounds)
                points += found
                wrong += problems
                print("\n".join([*map(said, found), *problems]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(points, indent=1))
        for other in list(versions[name])[1:]:
            ratios = [
                p["us"][other] / next(iter(p["us"].values())) for p in points if p["kernel"] == name
            ]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                print(f"{name}: {other} takes {mean:.4f} of the time, {max(ratios):.3f} at most")
    if not points:
        wrong.append("VERDICT nothing was compared")
    print("\n".join(wrong) or "VERDICT all outputs are equal")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
