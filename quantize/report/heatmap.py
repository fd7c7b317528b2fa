"""Heat maps: one pixel a cell in an indexed PNG that the browser enlarges, marks drawn above it.

A MiniMax-M3 has 29,184 cells in its four maps. As PNGs they are a few KB each; as SVG rectangles
they would be megabytes, and slow. Exact numbers are in the tables, whose rows have the ids that
:func:`cell_id` makes; the page's script looks them up there for its tooltips.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections import Counter
from dataclasses import dataclass

from quantize.report.findings import FAR, NAMES, Cell, Kind, Yardstick
from quantize.report.markup import text

# Viridis (CC0, Matplotlib), every 32nd colour: uniform to the eye, also to colour-blind ones.
_ANCHORS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
EXPERTS, DENSE = "e", "d"
"""Keys: what the ids of experts' and of dense linears' numbers begin with."""

_LEVELS = 128
_RINGS = 60
"""Marked cells that get a ring to be seen by; more of a kind are seen without."""


def _palette() -> bytes:
    """``_LEVELS`` RGB triples, from small errors to large."""
    anchors = [bytes.fromhex(colour) for colour in _ANCHORS.split()]
    colours = bytearray()
    for level in range(_LEVELS):
        position = level / (_LEVELS - 1) * (len(anchors) - 1)
        left = min(int(position), len(anchors) - 2)
        for a, b in zip(anchors[left], anchors[left + 1], strict=True):
            colours.append(round(a + (b - a) * (position - left)))
    return bytes(colours)


_PALETTE = _palette()


def gradient() -> str:
    """The palette in CSS, left to right."""
    return f"linear-gradient(90deg,{','.join(f'#{colour}' for colour in _ANCHORS.split())})"


def png(rows: list[bytes]) -> bytes:
    """An indexed PNG of ``rows``: 0 is transparent, 1 to ``_LEVELS`` the palette."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"PLTE", bytes(3) + _PALETTE),
            chunk(b"tRNS", b"\0"),
            # Level 0 stores without compressing: zlib builds differ in what they compress to, and
            # the same run must give the same bytes on every machine.
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 0)),
            chunk(b"IEND", b""),
        )
    )


def cell_id(key: str, row: int, column: int) -> str:
    """Id of the table row that has the numbers of a cell of the maps called ``key``."""
    return f"{key}{row}-{column}"


@dataclass(frozen=True)
class Axes:
    """What the maps of one set share.

    Attributes:
        key: prefix of their cells' ids.
        rows: labels, top to bottom.
        columns: labels, left to right.
        links: where the row labels lead, without ``#``; none if empty.
        names: what rows and columns are, such as ``("layer", "expert")``.
    """

    key: str
    rows: list[str]
    columns: list[str]
    links: list[str]
    names: tuple[str, str]


def heatmap(title: str, axes: Axes, cells: list[Cell], scale: Yardstick, width: int) -> str:
    """A figure of ``cells``, of whole pixels a cell and about ``width`` pixels wide."""
    rows, columns = len(axes.rows), len(axes.columns)
    label = max((len(name) for name in axes.rows), default=0)
    left, top = 14 + 7 * min(label, 40), 18
    w = min(max((width - left) // columns, 2 if width > 500 else 1), 40)
    h = max(min(width // 2 // rows, max(w, 12), 26), 4 if width < 500 else 6)
    total_w, total_h = left + columns * w + 1, top + rows * h + 4

    pixels = [bytearray(columns) for _ in range(rows)]
    marks: dict[Kind, list[Cell]] = {kind: [] for kind in Kind}
    for cell in cells:
        marks[cell.kind].append(cell)
        if cell.kind is Kind.FINE:
            pixels[cell.row][cell.column] = 1 + _level(cell.error, scale)
    image = base64.b64encode(png([bytes(row) for row in pixels])).decode()

    said = [f"{len(marks[kind])} {name}" for kind, name in NAMES.items() if marks[kind]]
    alt = (
        f"Heat map, {title}: {rows} {axes.names[0]}s by {columns} {axes.names[1]}s, "
        f"{', '.join(said) or 'none marked'}"
    )
    parts = [
        f'<svg class="map" role="img" aria-label="{text(alt)}" width="{total_w}" height="{total_h}"'
        f' viewBox="0 0 {total_w} {total_h}" data-key="{axes.key}" data-x="{left}" data-y="{top}"'
        f' data-w="{w}" data-h="{h}">',
        f'<image x="{left}" y="{top}" width="{columns * w}" height="{rows * h}"'
        f' preserveAspectRatio="none" href="data:image/png;base64,{image}"/>',
    ]
    for kind in NAMES:
        boxes = "".join(
            f"M{left + c.column * w} {top + c.row * h}h{w}v{h}h-{w}z" for c in marks[kind]
        )
        if boxes:
            parts.append(f'<path class="{kind.value}" d="{boxes}"/>')
    if w >= 10 and h >= 10:  # thinner cells would be all grid
        lines = "".join(f"M{left + i * w} {top}v{rows * h}" for i in range(columns + 1))
        lines += "".join(f"M{left} {top + i * h}h{columns * w}" for i in range(rows + 1))
        parts.append(f'<path class="grid" d="{lines}"/>')
    for kind in NAMES:
        found = marks[kind]
        if len(found) <= _RINGS and min(w, h) < 14:
            parts += [_ring(c, left + (c.column + 0.5) * w, top + (c.row + 0.5) * h) for c in found]
    parts += _labels(axes, left, top, w, h)
    return (
        f"<figure><figcaption>{text(title)}</figcaption>"
        f'<div class="wide">{"".join(parts)}</svg></div></figure>'
    )


def _ring(cell: Cell, x: float, y: float) -> str:
    circle = f'cx="{x:g}" cy="{y:g}" r="7"/>'
    kind = cell.kind.value
    return f'<circle class="halo {kind}" {circle}<circle class="ring {kind}" {circle}'


def _level(error: float, scale: Yardstick) -> int:
    part = (error - scale.low) / (scale.high - scale.low)
    return round(min(max(part, 0.0), 1.0) * (_LEVELS - 1))


def _labels(axes: Axes, left: int, top: int, w: int, h: int) -> list[str]:
    parts = []
    for i in range(0, len(axes.rows), step(h, 12)):
        name = axes.rows[i] if len(axes.rows[i]) <= 40 else f"…{axes.rows[i][-39:]}"
        label = f'<text x="{left - 6}" y="{top + i * h + h / 2 + 3.5:g}">{text(name)}</text>'
        parts.append(f'<a href="#{axes.links[i]}">{label}</a>' if axes.links else label)
    for i in range(0, len(axes.columns), step(w, 26)):
        x = left + i * w + w / 2
        parts.append(f'<text class="top" x="{x:g}" y="{top - 6}">{text(axes.columns[i])}</text>')
    return parts


def step(size: float, wanted: int) -> int:
    """Every how many cells of ``size`` pixels a label has ``wanted`` pixels: a power of two."""
    step = 1
    while step * size < wanted:
        step *= 2
    return step


def legend(scale: Yardstick, cells: list[Cell]) -> str:
    """What the colours and marks of maps of ``cells`` mean, and how many of each there are."""
    parts = []
    if scale.median > 0:
        beyond = [c.error for c in cells if c.kind is Kind.FINE]
        ticks = [scale.low + (scale.high - scale.low) * i / 4 for i in range(5)]
        names = [f"{tick:.4f}" if tick >= 0.001 else f"{tick:.2e}" for tick in ticks]
        names[0] = f"≤ {names[0]}" if min(beyond, default=math.inf) < scale.low else names[0]
        names[4] = f"≥ {names[4]}" if max(beyond, default=0.0) > scale.high else names[4]
        spans = "".join(f"<span>{name}</span>" for name in names)
        parts.append(
            f'<div class="ramp"><div style="background:{gradient()}"></div><p>{spans}</p>'
            f"<p><span>&minus;{1 - scale.low / scale.median:.0%}</span><span>median</span>"
            f"<span>+{scale.high / scale.median - 1:.0%}</span></p></div>"
        )
    said = {
        Kind.FAR: f"far above: {FAR:.0%} over the median of its projection",
        Kind.ZERO: "all zero: the original has nothing but zeros, no relative error",
        Kind.EXACT: "exact: error 0",
    }
    counts = Counter(cell.kind for cell in cells)
    keys = "".join(
        f'<li><svg width="14" height="14" aria-hidden="true"><path class="{kind.value}"'
        f' d="M1 1h12v12h-12z"/></svg>{words} <b>({counts[kind]:,})</b></li>'
        for kind, words in said.items()
    )
    return f'<div class="legend">{"".join(parts)}<ul>{keys}</ul></div>'
