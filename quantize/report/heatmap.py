"""Heat maps as SVG: cells of one colour are one path, their neighbours in a row one rectangle.

A MiniMax-M3 has 29,184 cells in its four maps: each an element of its own would be megabytes.
Exact numbers are in the tables, where the page's script finds them for its tooltips.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from quantize.report.findings import NAMES, Cell, Kind
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


@dataclass(frozen=True)
class HeatMap:
    """A map of errors.

    Attributes:
        x, y: where the cells begin, in pixels; w, h: size of a cell.
        paths: by class, what SVG's ``d`` says of its cells, in units of cells: :data:`Kind`'s
            values, and ``c0``, ``c1``, ... for ``Kind.FINE``.
        marked: how many cells there are of each remarkable kind, in words.
    """

    title: str
    grid: Grid
    x: int
    y: int
    w: int
    h: int
    paths: dict[str, str]
    marked: str


def heat_map(title: str, grid: Grid, cells: list[Cell], width: int) -> HeatMap:
    """The map that is about ``width`` pixels wide."""
    longest = max(map(len, grid.rows))
    x = 14 + 7 * min(longest, 40)
    w = min(max((width - x) // len(grid.columns), 2 if width > 500 else 1), 40)
    h = max(min(width // 2 // len(grid.rows), max(w, 12), 26), 4 if width < 500 else 6)
    counts = Counter(cell.kind for cell in cells)
    marked = [f"{counts[kind]} {name}" for kind, name in NAMES.items() if counts[kind]]
    said = ", ".join(marked) or "none marked"
    return HeatMap(title, grid, x, 18, w, h, _paths(grid, cells), said)


def every_nth(size: int, wanted: int) -> int:
    """Every how many cells of ``size`` pixels a label has ``wanted`` pixels: a power of two."""
    n = 1
    while n * size < wanted:
        n *= 2
    return n


def _paths(grid: Grid, cells: list[Cell]) -> dict[str, str]:
    classes: dict[tuple[int, int], str] = {}
    for cell in cells:
        kind = cell.kind.value
        if cell.kind is Kind.FINE:
            kind = f"c{round(grid.scale.position(cell.error) * (LEVELS - 1))}"
        classes[grid.place(cell.layer, cell.expert)] = kind
    paths: dict[str, str] = defaultdict(str)
    for (row, column), kind in sorted(classes.items()):
        if classes.get((row, column - 1)) != kind:
            end = column + 1
            while classes.get((row, end)) == kind:
                end += 1
            paths[kind] += f"M{column} {row}h{end - column}v1H{column}z"
    return dict(sorted(paths.items()))
