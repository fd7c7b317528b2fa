"""The first thing on the page: is anything off, and where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from quantize.report import dense
from quantize.report.data import LayerReport, RunReport
from quantize.report.findings import FAR, NAMES, Cell, Kind, Yardstick
from quantize.report.heatmap import EXPERTS, cell_id
from quantize.report.markup import number, plural, text

_LINES = 12
_NAMED = 6
"""Experts named in one line."""


@dataclass(frozen=True)
class _Finding:
    """Weights of one layer that are remarkable in the same way: ``(name, id, cells)`` each."""

    layer: LayerReport
    kind: Kind
    scale: Yardstick
    places: list[tuple[str, str, list[Cell]]]

    def line(self) -> str:
        named = []
        for name, place, cells in self.places[:_NAMED]:
            said = [text(c.projection) for c in cells]
            if self.kind is Kind.FAR:
                said = [
                    f"{text(c.projection)} {number(c.error)} ({self.scale.times(c)} its median)"
                    for c in cells
                ]
            named.append(f'<a href="#{place}">{text(name)}</a> {", ".join(said)}')
        more = len(self.places) - _NAMED
        rest = f"; and {more} more" if more > 0 else ""
        return (
            f'<li><b class="chip {self.kind.value}">{NAMES[self.kind]}</b>'
            f"<code>{text(self.layer.prefix)}</code> {'; '.join(named)}{rest}</li>"
        )


def section(run: RunReport, experts: Yardstick, linears: Yardstick) -> str:
    """A banner with a colour, a sentence, and links to what is remarkable."""
    reports = [*run.layers, *([run.dense] if run.dense else [])]
    weights = sum(len(layer.errors) * len(layer.projections) for layer in reports)
    found = list(_findings(run, experts, linears))
    far = sum(len(cells) for f in found if f.kind is Kind.FAR for _, _, cells in f.places)
    damaged = [layer for layer in reports if layer.scale_counts[0]]
    if far:
        level, mark = "bad", "!"
        title = f"{plural(far, 'weight')} {'is' if far == 1 else 'are'} far above the usual error"
    elif damaged:
        level, mark, title = "bad", "!", "Block scales of zero"
    elif not weights:
        level, mark, title = "warn", "0", "No weights were quantized"
    elif any(f.kind is Kind.ZERO for f in found):
        level, mark, title = "warn", "0", "Errors are as usual, but some weights are all zero"
    else:
        level, mark, title = "good", "✓", "Nothing stands out"

    lines = [
        f'<li><b class="chip far">zero scales</b><code>{text(layer.prefix)}</code> '
        f"{plural(layer.scale_counts[0], 'block scale')} of zero, which no run writes</li>"
        for layer in damaged
    ]
    lines += [f.line() for kind in NAMES for f in found if f.kind is kind]
    if len(lines) > _LINES:
        lines[_LINES:] = [f"<li>and {len(lines) - _LINES} more such lines</li>"]
    limits = ", ".join(
        f"{text(name)} {number(median * (1 + FAR))}" for name, median in experts.medians.items()
    )
    listed = f"<ul>{''.join(lines)}</ul>" if lines else ""
    return (
        f'<section class="verdict {level}"><span class="mark" aria-hidden="true">{mark}</span>'
        f"<div><h2>{title}</h2><p>{plural(weights, 'weight')} compared with the source. Far above "
        f"is more than {FAR:.0%} over the median of a projection{f': {limits}' if limits else ''}."
        f"</p>{listed}</div></section>"
    )


def _findings(run: RunReport, experts: Yardstick, linears: Yardstick) -> Iterator[_Finding]:
    for row, layer in enumerate(run.layers):
        names = [f"expert {i}" for i in range(len(layer.errors))]
        ids = [cell_id(EXPERTS, row, i) for i in range(len(layer.errors))]
        yield from _of_layer(layer, list(experts.cells(row, layer)), experts, names, ids)
    if run.dense:
        names = [dense.name(run.dense, i) for i in range(len(run.dense.errors))]
        cells = list(linears.cells(0, run.dense))
        yield from _of_layer(run.dense, cells, linears, names, dense.ids(run.dense))


def _of_layer(
    layer: LayerReport, cells: list[Cell], scale: Yardstick, names: list[str], ids: list[str]
) -> Iterator[_Finding]:
    for kind in NAMES:
        by_column: dict[int, list[Cell]] = defaultdict(list)
        for cell in cells:
            if cell.kind is kind:
                by_column[cell.column].append(cell)
        if by_column:
            places = [(names[column], ids[column], alike) for column, alike in by_column.items()]
            yield _Finding(layer, kind, scale, places)
