"""Heat maps as SVG: cells of one colour are one path, neighbours in a row one rectangle of it.

A MiniMax-M3 has 29,184 cells in its four maps: each an element of its own would be megabytes.
Exact numbers are in the tables, where the page's script finds them for its tooltips.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from quantize.report.findings import Cell, Kind
from quantize.report.grid import Grid

LEVELS = 64
"""Colours of errors that are as usual, classes ``c0`` (small) to ``c63``."""

# Viridis (CC0, Matplotlib), every 32nd colour: uniform to the eye, also to colour-blind ones.
_VIRIDIS = "440154472d7b3b528b2c728e21918c28ae805ec962addc30fde725"
_ANCHORS = [bytes.fromhex(_VIRIDIS[i : i + 6]) for i in range(0, len(_VIRIDIS), 6)]


def palette() -> list[str]:
    """``LEVELS`` colours in CSS, from small errors to large."""
    colours = []
    for level in range(LEVELS):
        position = level / (LEVELS - 1) * (len(_ANCHORS) - 1)
        left = min(int(position), len(_ANCHORS) - 2)
        pairs = zip(_ANCHORS[left], _ANCHORS[left + 1], strict=True)
        colours.append("#" + bytes(round(a + (b - a) * (position - left)) for a, b in pairs).hex())
    return colours


def paths(grid: Grid, cells: Iterable[Cell]) -> dict[str, str]:
    """SVG's ``d`` of all cells of a class, in units of cells: ``c0``, ``c1``, ... for those of
    ``Kind.FINE``, or the :class:`Kind`'s value."""
    classes: dict[tuple[int, int], str] = {}
    for cell in cells:
        kind = cell.kind.value
        if cell.kind is Kind.FINE:
            kind = f"c{round(grid.scale.position(cell.error) * (LEVELS - 1))}"
        classes[grid.place(cell.layer, cell.expert)] = kind
    drawn: dict[str, str] = defaultdict(str)
    for (row, column), kind in sorted(classes.items()):
        if classes.get((row, column - 1)) != kind:
            end = column + 1
            while classes.get((row, end)) == kind:
                end += 1
            drawn[kind] += f"M{column} {row}h{end - column}v1H{column}z"
    return dict(sorted(drawn.items()))  # those that are remarkable last, above the others


def every_nth(size: float, wanted: int) -> int:
    """Every how many cells of ``size`` pixels a label has ``wanted`` pixels: a power of two."""
    n = 1
    while n * size < wanted:
        n *= 2
    return n
