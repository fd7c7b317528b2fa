"""Changes of the bf16 Hopper kernel's source, made by text, so that the product's has no switches:
parts taken out, and stamps of the GPU's clock. A change whose text is no longer there is an error.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.native import jit
from vllm_nvfp4_moe.kernels.hopper.bf16 import TOKENS_8, TOKENS_64, TOKENS_128, Bf16Kernel
from vllm_nvfp4_moe.kernels.hopper.kernel import ARCHITECTURE
from vllm_nvfp4_moe.kernels.hopper.launch import TileShape
from vllm_nvfp4_moe.kernels.hopper.source import ORDINARY, Form

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
    return found
