"""The loading benchmark's verdict, and a load on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.load import measure, row, verdict
from tests.trained import Sizes

GIB = 2**30


def line(variant: str, seconds: float, peak: float) -> dict[str, Any]:
    within = peak <= 1.05 * 20 + 4
    return {
        "variant": variant, "seconds": seconds, "final": 20 * GIB, "peak": int(peak * GIB),
        "reserved": int(peak * GIB), "layer": 4 * GIB, "used": None, "ratio": peak / 20,
        "within": within,
    }  # fmt: skip


def test_the_worst_peak_and_the_best_seconds_count() -> None:
    lines = [line("stock", 12, 40), line("ours", 9, 24), line("ours", 6, 26), line("stock", 10, 40)]
    peak, beside = verdict(lines)
    assert "peak 26.000 GiB, BEYOND 1.05 x final + one layer = 25.000 GiB" in peak
    assert "0.60 of the seconds, 0.650 of the peak, 1.000 of the final bytes" in beside
    assert "within" in verdict([line("ours", 6, 24.9)])[0]
    numbers = ["12.00", "20.000", "4.000", "40.000", "40.000", "2.000"]
    assert row(lines[0]).split() == ["stock", *numbers]


def test_a_load_is_measured(quantized: dict[str, Path]) -> None:
    """In a process of its own, on this machine's CPU if it has no GPU."""
    found = measure(quantized["modelopt"], "ours", "auto", 200)
    sizes = Sizes.of(quantized["modelopt"])
    weights = sizes.experts * 3 * sizes.hidden * sizes.intermediate
    # 4.5 bits a weight; what kernels pad is at most as much again.
    assert weights * 9 / 16 <= found["layer"] < 2 * weights * 9 / 16
    assert found["parameters"] > 5 * found["layer"]
    assert 0 < found["seconds"] < 200 and found["peak"] > 0
