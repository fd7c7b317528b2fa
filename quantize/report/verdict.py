"""The first thing on the page: is anything off, and where."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from quantize.report.data import LayerReport
from quantize.report.findings import NAMES, Cell, Kind
from quantize.report.grid import Grid


@dataclass(frozen=True)
class Finding:
    """Weights of one layer of ``grid`` that are remarkable in the same way.

    Attributes:
        layer: position of the layer.
        cells: the weights, by expert (or linear).
    """

    kind: Kind
    grid: Grid
    layer: int
    cells: dict[int, list[Cell]]


@dataclass(frozen=True)
class Verdict:
    """A level (``good``, ``warn`` or ``bad``), a sentence, and what is remarkable.

    Attributes:
        weights: how many were compared.
        damaged: layers that have block scales of zero, which no run writes.
        findings: gravest first.
    """

    level: str
    title: str
    weights: int
    damaged: list[LayerReport]
    findings: list[Finding]


def judge(grids: list[Grid]) -> Verdict:
    """The verdict on all layers of ``grids``."""
    layers = [layer for grid in grids for layer in grid.layers]
    findings = [finding for kind in NAMES for grid in grids for finding in _of_kind(kind, grid)]
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
    elif counts[Kind.ZERO]:
        title = "Errors are as usual, but some weights are all zero"
    else:
        title = "Nothing stands out"
    level = "bad" if far or damaged else "warn" if counts[Kind.ZERO] or not weights else "good"
    return Verdict(level, title, weights, damaged, findings)


def _of_kind(kind: Kind, grid: Grid) -> list[Finding]:
    layers: dict[int, dict[int, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in grid.scale.cells(grid.layers):
        if cell.kind is kind:
            layers[cell.layer][cell.expert].append(cell)
    return [Finding(kind, grid, layer, dict(cells)) for layer, cells in layers.items()]
