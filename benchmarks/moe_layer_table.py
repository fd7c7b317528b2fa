"""Floors, tables and verdicts of ``benchmarks.moe_layer``: from saved numbers alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from quantize.experts.gates import Gate
from vllm_nvfp4_moe.doctor.shape import (
    CLAMPED,
    MINIMAX_M3,
    Shape,
    floor,
    restored,
    title,
)

GOAL = {"geomean": 1.3, "memory": 0.80, "flops": 0.70, "fp8": 1.5}
TITLES = {
    "ours": "ours",
    "fp8": "ours, FP8",
    "humming": "Humming",
    "marlin": "Marlin",
    "cutile": "FlashInfer cuTile",
    "flashinfer-fp8": "FlashInfer FP8",
    "bf16": "bf16 Triton",
}
EIGHT_BITS = {"fp8", "flashinfer-fp8"}
"""Those with FP8 activations: no rivals of ours in bf16."""


SHAPES = {
    shape.name: shape
    for shape in (
        MINIMAX_M3,
        Shape("qwen3-235b", 128, 4096, 1536, 8),
        Shape("deepseek-v3", 256, 7168, 2048, 8),
    )
}
"""Those that are timed if nobody asks for others."""
MORE = {
    shape.name: shape
    for shape in (
        Shape("nemotron-3-nano", 128, 2688, 1856, 6, Gate("relu2")),
        Shape("gpt-oss-120b", 128, 2880, 2880, 4, CLAMPED, biased=True),
        # What biases cost is the difference.
        Shape("gpt-oss-120b-unbiased", 128, 2880, 2880, 4, CLAMPED),
        # Few large experts, and many small ones: where other kernels are least far behind.
        Shape("mixtral-8x7b", 8, 4096, 14336, 2),
        Shape("small", 64, 2048, 1024, 8),
        # A part of MiniMax-M3's layer, for CPUs: vLLM's bf16 experts take SiLU alone there.
        Shape("minimax-m3-16", 16, 6144, 3072, 4),
    )
}


class Row:
    """One token count of a saved run."""

    def __init__(self, shape: Shape, saved: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.tokens: int = saved["tokens"]
        self.active: float = saved["active"]
        self.ms: dict[str, float] = saved["ms"]
        self.floor = floor(shape, self.tokens, self.active, about["bandwidth"], about["flops"])
        others = [ms for name, ms in self.ms.items() if name != "ours" and name not in EIGHT_BITS]
        ours, fp8 = self.ms.get("ours"), self.ms.get("fp8")
        self.ratio = min(others) / ours if ours and others else None
        """Of the best other's time to ours: above 1 where ours is faster."""
        self.gain = ours / fp8 if ours and fp8 else None
        """Of our time to that with FP8 activations."""

    def reached(self, bound: float) -> float | None:
        """``bound`` (ms) over our time; None if ours was not timed."""
        return bound / self.ms["ours"] if "ours" in self.ms else None


def number(value: float | None) -> str:
    """Milliseconds, to about three digits."""
    if value is None:
        return "-"
    return f"{value:.{4 if value < 0.1 else 3 if value < 10 else 2}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _rows(saved: Mapping[str, Any], about: Mapping[str, Any]) -> list[Row]:
    return [Row(restored(saved["shape"]), row, about) for row in saved["rows"]]


def table(saved: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Markdown of one shape's rows, in milliseconds."""
    kernels = [name for name in TITLES if name in saved["kernels"]]
    head = ["tokens", "experts", *(TITLES[name] for name in kernels)]
    head += ["floor", "bound", "best other / ours", "floor / ours"]
    head += ["ours / FP8"] if "fp8" in kernels else []
    lines = [f"| {' | '.join(head)} |", "| ---: " * len(head) + "|"]
    for row in _rows(saved, about):
        cells = [str(row.tokens), f"{row.active:.0f}", *(number(row.ms.get(k)) for k in kernels)]
        cells += [number(row.floor.ms), row.floor.bound]
        cells += [_share(row.ratio), _share(row.reached(row.floor.ms))]
        cells += [_share(row.gain)] if "fp8" in kernels else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def beside_table(saved: Mapping[str, Any]) -> str:
    """Markdown of one shape's rows beside a shared expert, in milliseconds.

    The last column is what ours takes longer than alone, in parts of the shared expert alone: 0
    where that is hidden, 1 where both add up, more where they hinder each other.
    """
    rows = [row for row in saved["rows"] if "beside" in row]
    kernels = [name for name in TITLES if name in saved["kernels"]]
    head = ["tokens", "shared expert alone", *(TITLES[name] for name in kernels)]
    head += ["best other / ours", "(ours - ours alone) / shared"]
    lines = [f"| {' | '.join(head)} |", "| ---: " * len(head) + "|"]
    for row in rows:
        ms, alone, shared = row["beside"], row["ms"].get("ours"), row["shared"]
        ours = ms.get("ours")
        others = [ms[name] for name in ms if name != "ours" and name not in EIGHT_BITS]
        cells = [str(row["tokens"]), number(shared), *(number(ms.get(name)) for name in kernels)]
        cells.append(_share(min(others) / ours if ours and others else None))
        cells.append(_share((ours - alone) / shared if ours and alone and shared else None))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(saved: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """How much faster ours is; for MiniMax-M3 whether its goals hold."""
    rows = _rows(saved, about)
    ratios = {row.tokens: row.ratio for row in rows if row.ratio is not None}
    if not ratios:
        return []
    mean = statistics.geometric_mean(ratios.values())
    worst = min(ratios, key=lambda tokens: ratios[tokens])
    lines = [
        f"best other / ours: geometric mean {mean:.3f} of {len(ratios)} token counts, "
        f"smallest {ratios[worst]:.3f} at {worst}"
    ]
    shape = restored(saved["shape"])
    if (shape.name, shape.tp, about["routing"]) != ("minimax-m3", 1, "uniform"):
        return lines
    memory = [row.reached(row.floor.memory) for row in rows if 16 <= row.tokens <= 256]
    flops = [row.reached(row.floor.flops) for row in rows if row.tokens == 8192]
    goals: list[tuple[str, float | None, float]] = [
        ("geometric mean of best other / ours", mean, GOAL["geomean"]),
        ("smallest of best other / ours", ratios[worst], 1.0),
        ("smallest memory floor / ours at 16 to 256", _least(memory), GOAL["memory"]),
        ("FLOP floor / ours at 8192", _least(flops), GOAL["flops"]),
    ]
    if "fp8" in saved["kernels"]:
        gains = [row.gain for row in rows if row.tokens == 8192]
        goals.append(("ours / FP8 at 8192", _least(gains), GOAL["fp8"]))
    for what, found, wanted in goals:
        if found is None:
            lines.append(f"GOAL not measured: {what}, at least {wanted:.2f}")
        else:
            holds = "holds" if found >= wanted else "MISSED"
            lines.append(f"GOAL {holds}: {what} {found:.3f}, at least {wanted:.2f}")
    return lines


def _least(values: Sequence[float | None]) -> float | None:
    """The smallest; None where there are none, or one is missing."""
    found = [value for value in values if value is not None]
    return min(found) if found and len(found) == len(values) else None


def report(run: Mapping[str, Any]) -> str:
    """A whole saved run in Markdown."""
    about = run["about"]
    parts = ["; ".join(f"{key} {value}" for key, value in about.items())]
    for saved in run["shapes"]:
        kernels = ", ".join(f"{TITLES[k]}: {name}" for k, name in saved["kernels"].items())
        shape = title(restored(saved["shape"]))
        parts += [f"### {shape}", table(saved, about), f"Kernels: {kernels}."]
        absent = [f"{TITLES[k]}: {why}" for k, why in saved.get("absent", {}).items()]
        parts += [f"Absent: {'; '.join(absent)}."] if absent else []
        if any("beside" in row for row in saved["rows"]):
            parts += ["Beside a shared expert:", beside_table(saved)]
        lines = summary(saved, about)
        if clocks := saved.get("clocks", {}).get("sm"):
            lines.append("MHz while timing, least, median and most: " + ", ".join(map(str, clocks)))
        parts += ["\n".join(f"- {line}" for line in lines)]
    parts += [f"WRONG {problem}" for problem in run["problems"]]
    return "\n\n".join(part for part in parts if part)
