"""The first thing on the page: is anything off, and where."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from quantize.report.data import CalibrationReport, LayerReport
from quantize.report.findings import NAMES, Cell, Kind
from quantize.report.grid import Grid
from quantize.report.reasons import reasons, starved


@dataclass(frozen=True)
class Finding:
    """Weights of one layer of ``grid`` that are remarkable in the same way.

    Attributes:
        layer: position of the layer.
        cells: the weights, by expert (or linear).
        why: sentences.
    """

    kind: Kind
    grid: Grid
    layer: int
    cells: dict[int, list[Cell]]
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A level (``good``, ``warn`` or ``bad``), a sentence, and what is remarkable.

    Attributes:
        weights: how many were compared.
        damaged: layers that have block scales of zero, which no run writes.
        findings: gravest first.
        starved: experts that got too few tokens to be calibrated, by their layer's position.
    """

    level: str
    title: str
    weights: int
    damaged: list[LayerReport]
    findings: list[Finding]
    starved: dict[int, list[int]]


def judge(grids: list[Grid], used: CalibrationReport | None = None) -> Verdict:
    """The verdict on all layers of ``grids``, the first of which has the experts."""
    layers = [layer for grid in grids for layer in grid.layers]
    findings = [
        replace(found, why=tuple(reasons(kind, grid.layers[found.layer], found.cells, used)))
        for kind in NAMES
        for grid in grids
        for found in _of_kind(kind, grid)
    ]
    few = {
        n: experts for n, layer in enumerate(grids[0].layers) if (experts := starved(layer, used))
    }
    counts: Counter[Kind] = Counter()
    for finding in findings:
        counts[finding.kind] += sum(map(len, finding.cells.values()))
    weights = sum(len(layer.errors) * len(layer.projections) for layer in layers)
    damaged = [layer for layer in layers if layer.scale_counts[0]]
    if far := counts[Kind.FAR]:
        title = f"{far:,} weight{' is' if far == 1 else 's are'} far above the usual error"
    elif damaged:
        title = "Block scales of zero"
    elif not weights:
        title = "No weights were quantized"
    elif low := counts[Kind.LOW]:
        title = f"{low:,} weight{' is' if low == 1 else 's are'} far below the usual error"
    elif counts[Kind.ZERO]:
        title = "Errors are as usual, but some weights are all zero"
    elif few:
        count = sum(map(len, few.values()))
        title = f"Errors are as usual, but {count:,} expert{'s' * (count != 1)} got too little text"
    else:
        title = "Nothing stands out"
    level = (
        "bad"
        if far or damaged
        else "warn"
        if counts[Kind.LOW] or counts[Kind.ZERO] or few or not weights
        else "good"
    )
    return Verdict(level, title, weights, damaged, findings, few)


def _of_kind(kind: Kind, grid: Grid) -> list[Finding]:
    layers: dict[int, dict[int, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in grid.scale.cells(grid.layers):
        if cell.kind is kind:
            layers[cell.layer][cell.expert].append(cell)
    return [Finding(kind, grid, layer, dict(cells)) for layer, cells in layers.items()]
