"""Compile the tiles among which FlashInfer's cuTile experts choose, many at once, before a run.

    python -m benchmarks.flashinfer_cutile_compile --shapes qwen3-235b --tokens 1 64

FlashInfer's tuner compiles one tile after the other, about 20 for each product, and a large one
takes ten seconds and more. cuTile keeps what was compiled in a folder (``CUDA_TILE_CACHE_DIR``),
by its bytecode; here many processes fill that folder, each calling the layer with its own part of
the tiles. The weights are never read for their values: they are as the memory was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.flashinfer_cutile import CuTile
from benchmarks.moe_layer_table import MORE, SHAPES
from quantize.nvfp4.format import BLOCK
from vllm_nvfp4_moe.doctor.inputs import Batch, Stored
from vllm_nvfp4_moe.doctor.shape import Shape


def blank(shape: Shape, device: torch.device) -> tuple[Stored, Stored]:
    """Weights of its sizes, of no value."""

    def matrices(rows: int, columns: int) -> Stored:
        return Stored(
            torch.empty(shape.experts, rows, columns // 2, dtype=torch.uint8, device=device),
            torch.empty(
                shape.experts, rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device=device
            ),
            torch.ones(shape.experts, device=device),
        )

    rows = (shape.matrices - 1) * shape.intermediate
    return matrices(rows, shape.hidden), matrices(shape.hidden, shape.intermediate)


def part(shape: Shape, tokens: Sequence[int], place: int, of: int) -> list[str]:
    """Call the layer with each ``of``-th pair of tiles from ``place`` on; what failed."""
    device = torch.device("cuda", 0)
    layer = CuTile(shape, *blank(shape, device))
    runner = layer.runner
    problems = []
    for count in tokens:
        x = torch.zeros(count, shape.hidden, dtype=torch.bfloat16, device=device)
        slots = torch.arange(count * shape.top_k, dtype=torch.int32, device=device)
        ids = (slots % shape.experts).view(count, shape.top_k)
        inputs = layer.packed(Batch(x, torch.ones_like(ids).float(), ids))
        fallback = runner._fp4_fallback_tactic(inputs)
        stages = [
            runner._stage_tactics(inputs, stage=stage, block_size=fallback[0]) for stage in (1, 2)
        ]
        # The n-th of one product with the n-th of the other: each is compiled once.
        for n in range(place, max(map(len, stages)), of):
            first, second = (tiles[n % len(tiles)] for tiles in stages)
            tactic = (fallback[0], *first, *second)
            try:
                runner.forward(inputs, tactic=tactic)
                torch.cuda.synchronize()
            except Exception as error:  # the tuner skips it, too
                problems.append(f"{count} tokens, {tactic}: {type(error).__name__}: {error}"[:300])
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the folder; 0, also where tiles failed: FlashInfer's tuner then does without them."""
    every = {**SHAPES, **MORE}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=every, default=list(SHAPES))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**n for n in range(15)])
    parser.add_argument("--processes", type=int, default=9)
    args = parser.parse_args(arguments)
    # No process inherits another's CUDA.
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for name in args.shapes:
            begin = time.monotonic()
            shape = every[name].slice(args.tp)
            work = [(shape, args.tokens, n, args.processes) for n in range(args.processes)]
            found: list[Any] = pool.starmap(part, work, chunksize=1)
            problems = [problem for each in found for problem in each]
            print(f"{name}: {time.monotonic() - begin:.0f} s, {len(problems)} failed", flush=True)
            print("\n".join(problems[:5]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
