"""The bf16 Hopper kernel's counters at MiniMax-M3's layer, and the instructions at which its warps
stand, by Nsight Compute:

    python -m benchmarks.hopper_ncu [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.hopper_profile import Weights
from benchmarks.hopper_variants import FEW_SHAPES, MANY_SHAPES, Variant
from vllm_nvfp4_moe.doctor.inputs import batch
from vllm_nvfp4_moe.doctor.shape import MINIMAX_M3
from vllm_nvfp4_moe.kernels.hopper.bf16 import TOKENS_8, TOKENS_64, TOKENS_128

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


def target(few: Variant, many: Variant) -> None:
    """What Nsight Compute looks at: a call of each point."""
    weights = Weights(MINIMAX_M3)
    for tokens, shape in NCU_POINTS:
        given = batch(MINIMAX_M3, tokens, False, weights.generator)
        weights.call(few if tokens <= 8 else many, shape, given)
    torch.cuda.synchronize()


def ncu(folder: Path) -> None:
    """Counters and the instructions that warps stand at, of both products at MiniMax-M3's layer."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "hopper.ncu-rep"
    command = [
        "ncu", "--clock-control", "none", "--cache-control", "none", "-f", "-o", str(report),
        "-k", "regex:^gemm", *(word for name in SECTIONS for word in ("--section", name)),
        sys.executable, "-m", "benchmarks.hopper_ncu", "--target",
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
    parser.add_argument("--folder", type=Path, default=Path("ncu"))
    parser.add_argument("--target", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kernels = [Variant(shapes, ()) for shapes in (FEW_SHAPES, MANY_SHAPES)]
    if args.target:
        target(*kernels)
        return 0
    for kernel in kernels:
        kernel.compile()
    ncu(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
