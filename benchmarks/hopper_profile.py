"""What bounds the bf16 Hopper kernel: its launches' timeline, and its times with parts taken out.

    python -m benchmarks.hopper_profile --build                      compile: no GPU is needed
    python -m benchmarks.hopper_profile [few] [many]                 the tables
    python -m benchmarks.hopper_profile ncu [--folder FOLDER]        counters, by Nsight Compute

``few``: 1 to 8 tokens; ``many``: 512 to 2048, of small experts 256 to 2048. A timeline is of one
call after another in a CUDA graph: when each launch's CTAs begin, have waited for the launch
before, have their first stage, have issued their last copy of weights, and end; microseconds since
the call's first instruction by the GPU's clock, medians over calls of the least, the middle and the
last CTA. Ablations take a part out of the source by text, so that the product's source has no
switches; their outputs are wrong, and their times are medians of replays that take turns. A patch
whose text is no longer in the source is an error.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.hopper_tiles import MIXTRAL, QWEN3, SMALL, captured
from quantize.native import jit
from vllm_nvfp4_moe.doctor.inputs import Batch, batch, batches, random_weights
from vllm_nvfp4_moe.doctor.shape import MINIMAX_M3, Shape, active_experts, floor
from vllm_nvfp4_moe.doctor.timing import time_on_gpu
from vllm_nvfp4_moe.kernels.hopper.bf16 import (
    TOKENS_8,
    TOKENS_64,
    TOKENS_128,
    Bf16Kernel,
)
from vllm_nvfp4_moe.kernels.hopper.kernel import ARCHITECTURE, Experts
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.source import ORDINARY, Form

BANDWIDTH, FLOPS = 4.3, 790.0
CALLS = 12
"""Of which a timeline is the median."""
CTAS = 2048
"""That a launch's stamps are kept of."""


@dataclass(frozen=True)
class Patch:
    """A change of the source by text, ``old`` being there so many ``times``."""

    old: str
    new: str
    times: int = 1

    def apply(self, source: str) -> str:
        found = source.count(self.old)
        if found != self.times:
            raise SystemExit(f"the source has {found} times, not {self.times}: {self.old!r}")
        return source.replace(self.old, self.new)


# ------------------------------------------------------------------------------------ ablations

HALF = """#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Fragment fragment = """
BY_WARPS = HALF + "load_fragment(weights"
BY_GROUPS = HALF + "load_fragment(base"
WARP_DEQUANTIZE = "dequantize(a, fragment, 0, args.multipliers);"
GROUP_DEQUANTIZE = "dequantize(weights, fragment, first, args.multipliers);"
GROUP_MMA = "mma<N>(d, weights[k], b + half * (N * 128 >> 4) + 2 * (first + k));"
WARP_MMAS = """load_matrices(b, x + j * 1024);
                    warp_mma(d + 4 * j, a[2 * pair], b[0], b[1]);
                    warp_mma(d + 4 * j, a[2 * pair + 1], b[2], b[3]);"""
WRITE = "    if (row_tile + row_group < args.row_tiles)\n        write_tile<N, FIRST>"

RAW_CODES = """const uint32_t raw[4] = {fragment.codes.x, fragment.codes.y, fragment.codes.z,
                                fragment.codes.w};"""
RAW = f"""{{ {RAW_CODES} for (int i = 0; i < 4; ++i)
           for (int r = 0; r < 4; ++r) a[i][r] = raw[(i + r) % 4] & 0x3FFF3FFF; }}"""
GROUP_RAW = f"""{{ {RAW_CODES} for (int k = 0; k < AT_ONCE; ++k)
           for (int r = 0; r < 4; ++r) weights[k][r] = raw[(first + k + r) % 4] & 0x3FFF3FFF; }}"""
X_COPY = "bulk_copy(to, from, bytes, barrier, policy);"
EXPECT = "barrier_expect(barrier, bytes);"

NO_WARP_WORK = Patch(BY_WARPS, BY_WARPS.replace("half < 2", "half < 0"))
NO_GROUP_WORK = (Patch(GROUP_DEQUANTIZE, ""), Patch(GROUP_MMA, ""))
NO_X = (Patch(X_COPY, ""), Patch(EXPECT, EXPECT.replace("bytes", "WEIGHTS ? bytes : 0")))
NO_WRITE = Patch(WRITE, WRITE.replace("if (", "if (d[0] == 12345.0f && "))

ABLATIONS: dict[str, tuple[Patch, ...]] = {
    "whole": (),
    "copies": (NO_WARP_WORK, *NO_GROUP_WORK, NO_WRITE),
    "copies of weights": (NO_WARP_WORK, *NO_GROUP_WORK, NO_WRITE, *NO_X),
    "no X": NO_X,
    "no MMA": (
        Patch(
            WARP_MMAS,
            "d[4 * j] += __uint_as_float(a[2 * pair][0] ^ a[2 * pair][1] ^ a[2 * pair][2] ^ "
            "a[2 * pair][3]); d[4 * j + 1] += __uint_as_float(a[2 * pair + 1][0] ^ "
            "a[2 * pair + 1][1] ^ a[2 * pair + 1][2] ^ a[2 * pair + 1][3]);",
        ),
        Patch(
            GROUP_MMA,
            "d[k] += __uint_as_float(weights[k][0] ^ weights[k][1] ^ weights[k][2] ^ "
            "weights[k][3]);",
        ),
    ),
    "no dequantizing": (Patch(WARP_DEQUANTIZE, RAW), Patch(GROUP_DEQUANTIZE, GROUP_RAW)),
    "MMAs alone": (
        Patch(WARP_DEQUANTIZE, RAW),
        Patch(GROUP_DEQUANTIZE, "if (step == 0) " + GROUP_RAW),
    ),
    "no writing": (NO_WRITE,),
}
FEW = ("whole", "copies", "copies of weights", "no X", "no MMA",
       "no dequantizing", "no writing")  # fmt: skip
MANY = ("whole", "copies", "no X", "no MMA", "no dequantizing", "MMAs alone", "no writing")

# ------------------------------------------------------------------------------------- timelines

STAMP = f"""
namespace {{
__device__ unsigned long long stamps[5][5][{CTAS}];
__device__ __forceinline__ void stamp(int kernel, int event) {{
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now) :: "memory");
    if (blockIdx.x < {CTAS}) stamps[kernel][event][blockIdx.x] = now;
}}
}}
extern "C" __attribute__((visibility("default"))) int read_stamps(void* to, int clear) {{
    static unsigned long long zeros[5][5][{CTAS}];
    return clear ? cudaMemcpyToSymbol(stamps, zeros, sizeof(zeros))
                 : cudaMemcpyFromSymbol(to, stamps, sizeof(stamps));
}}
"""
BEGINS, WAITED, FULL, ISSUED, ENDS = range(5)


def stamped(kernel: int | str, event: int, condition: str = "threadIdx.x == 0") -> str:
    return f" if ({condition}) stamp({kernel}, {event});\n"


GEMM = "FIRST ? 2 : 3"
WAIT, TRIGGER = "wait_for_previous_kernel();", "trigger_next_kernel();"
LAST_OF_GEMM = "empty),\n         ...);\n"
FIRST_TILE = "        Tile next = args.tiles[schedule.tile(index)];\n"
PRODUCE = "if (elected()) produce<Shape, Input::WEIGHTS>(args, schedule, total, full);"
LAST_OF_ROUTE = "number - tile * step, 0};\n    }\n}"
LAST_OF_GATHER = "unit < hidden / 8 ? row[unit] : make_uint4(0, 0, 0, 0));\n}"
LAST_OF_COMBINE = "pack_bf16x2(sum[4], sum[5]), pack_bf16x2(sum[6], sum[7]));\n}"
COMBINE = "    __shared__ int rows[COMBINE_THREADS];\n"


def before(text: str, more: str) -> Patch:
    return Patch(text, more + text)


def after(text: str, more: str) -> Patch:
    return Patch(text, text + more)


def at_end(text: str, kernel: int, times: int = 1) -> Patch:
    """``text`` ends with the brace of a kernel."""
    return Patch(text, f"{text[:-1]}    __syncthreads();\n{stamped(kernel, ENDS)}}}", times)


TIMELINE = (
    after("extern __shared__ uint8_t memory[];\n", stamped(GEMM, BEGINS)),
    after(
        f"if constexpr (FIRST && NEW_TABLES) {WAIT}",
        stamped(GEMM, WAITED, "FIRST && threadIdx.x == 0"),
    ),
    after(
        f"if constexpr (!FIRST || !NEW_TABLES) {WAIT}",
        stamped(GEMM, WAITED, "!FIRST && elected()"),
    ),
    Patch(
        PRODUCE,
        PRODUCE.replace("produce", "{ produce").replace("full);", "full); ")
        + f"stamp({GEMM}, {ISSUED}); }}",
    ),
    after(
        FIRST_TILE,
        "        if (index < schedule.items(tiles)) {\n"
        f"            barrier_wait(full, 0);{stamped(GEMM, FULL)}        }}\n",
    ),
    after(LAST_OF_GEMM, stamped(GEMM, ENDS)),
    before("    counts[thread] = 0;\n", stamped(0, BEGINS)),
    before("    // From here on a thread is an expert.\n", stamped(0, WAITED)),
    at_end(LAST_OF_ROUTE, 0),
    after("    constexpr int AHEAD = 4;\n", stamped(0, BEGINS)),
    before("    if (threadIdx.x == 0) places[blockIdx.x] = place;\n", stamped(0, WAITED)),
    Patch(f"    {WAIT}\n    {TRIGGER}\n    const Place",
          f"{stamped(1, BEGINS)}    {WAIT}\n{stamped(1, WAITED)}    {TRIGGER}\n    const Place"),
    at_end(LAST_OF_GATHER, 0, times=2),  # of both; that of `gather` is in the row of `route`
    after(COMBINE, stamped(4, BEGINS)),
    after(f"if (!begin) {WAIT}", stamped(4, WAITED)),
    at_end(LAST_OF_COMBINE, 4),
)  # fmt: skip
KERNEL_NAMES = ("route", "gather", "first", "second", "combine")
EVENTS = ("begins", "waited", "full", "issued", "ends")

# -------------------------------------------------------------------------------------- variants


class Variant(Bf16Kernel):
    """The kernel with a changed source, and with some of its tile shapes alone."""

    def __init__(self, shapes: Sequence[TileShape], patches: Sequence[Patch], head: str = "",
                 file: Path | None = None) -> None:  # fmt: skip
        super().__init__()
        self.tile_shapes = tuple(shapes)
        self.patches, self.head = patches, head
        if file:
            self.file = file

    def source(self, form: Form = ORDINARY) -> str:
        text = super().source(form)
        for patch in self.patches:
            text = patch.apply(text)
        kept = [str(shape) for shape in self.tile_shapes]
        text, found = re.subn(
            r"^DEFINE_GEMMS\((\d+), (\d+),.*\n",
            lambda line: line[0] if f"{line[1]}x{line[2]}" in kept else "",
            text,
            flags=re.MULTILINE,
        )
        assert found, "no DEFINE_GEMMS"
        table = ", ".join(f"GEMMS_{name}" for name in kept)
        text = re.sub(r"(constexpr Gemms GEMMS\[\] = ){[^}]*}", rf"\1{{{table}}}", text)
        marker = "namespace { constexpr bool GATED"
        assert text.count(marker) == 1
        return text.replace(marker, self.head + marker)

    def compile(self) -> ctypes.CDLL:
        return jit.load(self.source(), LANGUAGE)

    def library(self, device: int, form: Form) -> ctypes.CDLL:
        if (device, form) not in self._libraries:
            library = jit.load(self.source(form), LANGUAGE)
            from vllm_nvfp4_moe.kernels.hopper.launch import check, check_library

            check_library(library, self.tile_shapes)
            check(library, library.prepare())
            self._libraries[device, form] = library
        return self._libraries[device, form]


LANGUAGE = jit.cuda(ARCHITECTURE)
FEW_SHAPES = (TOKENS_8, TOKENS_64)
MANY_SHAPES = (TOKENS_64, TOKENS_128)


def variants(kinds: Sequence[str]) -> dict[tuple[str, str], Variant]:
    found = {}
    for kind, names, shapes in (("few", FEW, FEW_SHAPES), ("many", MANY, MANY_SHAPES)):
        if kind in kinds:
            for name in names:
                found[kind, name] = Variant(shapes, ABLATIONS[name])
            found[kind, "timeline"] = Variant(shapes, TIMELINE, STAMP)
    if "ncu" in kinds:
        found["few", "whole"] = Variant(FEW_SHAPES, ())
        found["many", "whole"] = Variant(MANY_SHAPES, ())
    return found


# --------------------------------------------------------------------------------------- running


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


# ------------------------------------------------------------------------------------------- ncu

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats",
    "WarpStateStats", "SourceCounters",
)  # fmt: skip
METRICS = (
    r"gpu__time_duration\.sum$",
    r"smsp__cycles_elapsed\.avg\.per_second|sm__cycles_elapsed\.avg\.per_second",
    r"dram__bytes.*per_second|gpu__dram_throughput.*pct|lts__throughput.*pct",
    r"sm__throughput.*pct|smsp__issue_active\.avg\.per_cycle|smsp__warps_eligible\.avg",
    r"sm__inst_executed_pipe_\w+\.avg\.pct|sm__pipe_\w+\.avg\.pct",
    r"l1tex__data_pipe_lsu_wavefronts_mem_shared.*(pct|sum)$|l1tex__data_bank_conflicts.*sum$",
)
"""Of the sections' metrics, those that are printed."""
NCU_POINTS = ((1, TOKENS_8), (8, TOKENS_64), (512, TOKENS_64), (1024, TOKENS_64),
              (1024, TOKENS_128), (2048, TOKENS_128))  # fmt: skip


def ncu_target() -> None:
    weights = Weights(MINIMAX_M3)
    kernels = {shape: Variant(FEW_SHAPES if tokens <= 8 else MANY_SHAPES, ())
               for tokens, shape in NCU_POINTS}  # fmt: skip
    for tokens, shape in NCU_POINTS:
        weights.call(kernels[shape], shape, batch(MINIMAX_M3, tokens, False, weights.generator))
    torch.cuda.synchronize()


def ncu(folder: Path) -> None:
    """Counters and the instructions that warps stand at, of both products at MiniMax-M3's layer."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "hopper.ncu-rep"
    command = [
        "ncu", "--clock-control", "none", "--cache-control", "none", "-f", "-o", str(report),
        "-k", "regex:^gemm", *(word for name in SECTIONS for word in ("--section", name)),
        sys.executable, "-m", "benchmarks.hopper_profile", "ncu-target",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ncu failed: {(done.stdout + done.stderr)[-3000:]}")

    def page(*arguments: str) -> str:
        done = subprocess.run(["ncu", "--import", str(report), "--csv", *arguments],
                              check=True, capture_output=True, text=True)  # fmt: skip
        return done.stdout

    points = [f"{tokens} tokens" for tokens, _ in NCU_POINTS for _ in range(2)]
    raw = page("--page", "raw", "--print-units", "base")
    (folder / "raw.csv").write_text(raw)
    source = page("--page", "source", "--print-source", "sass")
    (folder / "source.csv").write_text(source)
    rows = [row for row in csv.DictReader(io.StringIO(raw)) if row.get("ID")]
    for point, row in zip(points, rows, strict=False):
        print(f"{point} {row['Kernel Name'].split('(')[0]}")
        for pattern in METRICS:
            cells = [
                f"{name.removesuffix('.pct_of_peak_sustained_active')} {value}"
                for name, value in row.items()
                if name and value and re.search(pattern, name)
            ]
            print("    " + ", ".join(cells))
        stalls = []
        for name, value in row.items():
            if name and value and "issue_stalled" in name and "not_issued" not in name:
                short = name.split("stalled_")[1].split("_per_")[0]
                stalls.append((float(value.replace(",", "")), short))
        top = sorted(stalls, reverse=True)[:8]
        print("    stalls: " + ", ".join(f"{name} {value:.3g}" for value, name in top))
    print_hot(source, points)


def print_hot(text: str, points: Sequence[str], most: int = 22) -> None:
    """The instructions of each kernel at which most samples were taken."""
    number = -1
    header: list[str] | None = None
    tables: list[tuple[list[str], list[list[str]]]] = []
    for row in csv.reader(io.StringIO(text)):
        if "Source" in row and any("Samples" in cell for cell in row):
            header, number = row, number + 1
            tables.append((header, []))
        elif header and len(row) == len(header):
            tables[-1][1].append(row)
    for (names, rows), point in zip(tables, points, strict=False):
        place = next(i for i, n in enumerate(names) if n.startswith("# Samples") or "Samples" in n)
        at = names.index("Source")
        stall = [i for i, n in enumerate(names) if n.startswith("stall_") and "Not" not in n]

        def count(row: list[str], i: int) -> float:
            try:
                return float(row[i].replace(",", "") or 0)
            except ValueError:
                return 0.0

        total = sum(count(row, place) for row in rows) or 1.0
        print(f"{point}, {names[place]} {total:.0f}, {len(rows)} instructions")
        hot = sorted(range(len(rows)), key=lambda i: -count(rows[i], place))[:most]
        for i in sorted(hot):
            row = rows[i]
            why = sorted(((count(row, s), names[s][6:]) for s in stall), reverse=True)[:3]
            said = " ".join(f"{name} {n:.0f}" for n, name in why if n)
            share = 100 * count(row, place) / total
            print(f"  {i:5} {share:5.1f} % {row[at].strip()[:60]:60} {said}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["few", "many"])
    parser.add_argument("--build", action="store_true", help="compile, and stop")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds to stop after")
    parser.add_argument("--folder", type=Path, default=Path("ncu"))
    args = parser.parse_args()
    begin = time.monotonic()
    if args.what == ["ncu-target"]:
        ncu_target()
        return 0
    made = variants(args.what)
    with ThreadPoolExecutor(2 if args.build else 16) as pool:
        list(pool.map(Variant.compile, made.values()))
    print(f"{len(made)} libraries ready after {time.monotonic() - begin:.0f} s", flush=True)
    if args.build:
        return 0
    print(torch.cuda.get_device_name(0), flush=True)
    for kind in args.what:
        if kind == "ncu":
            ncu(args.folder)
        else:
            profile(kind, begin + args.limit)
    print(f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
