"""Dense linears that were quantized too: one map, kinds of linears by layers."""

from __future__ import annotations

import re

from quantize.report.data import LayerReport
from quantize.report.findings import Cell, Yardstick
from quantize.report.heatmap import DENSE, Axes, cell_id, heatmap, legend
from quantize.report.histogram import histogram
from quantize.report.layers import numbers
from quantize.report.markup import plural, size, table

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def name(layer: LayerReport, index: int) -> str:
    """What linear ``index`` is called."""
    return layer.names[index] if layer.names else f"linear.{index}"


def section(layer: LayerReport, scale: Yardstick) -> str:
    """The map, its legend, and all numbers."""
    rows, columns, places = _places(layer)
    axes = Axes(DENSE, rows, columns, [], ("kind", "layer"))
    cells = [
        Cell(*places[cell.column], cell.projection, cell.error, cell.kind)
        for cell in scale.cells(0, layer)
    ]
    found = ids(layer)
    listed = [
        numbers(found[i], name(layer, i), errors, layer, scale)
        for i, errors in enumerate(layer.errors)
    ]
    return (
        '<section class="card"><h2>Dense linears</h2>'
        f'<p class="about">{plural(len(layer.errors), "linear")}, '
        f"{size(layer.bytes_before)} → {size(layer.bytes_after)}; relative error as above. Rows "
        "are kinds of linears, columns layers.</p>"
        + legend(scale, cells)
        + (heatmap("dense linears", axes, cells, scale, 1064) if cells else "")
        + '<details class="alone"><summary>Numbers and block scales</summary>'
        f'<div class="inside"><div>{histogram("the dense linears", layer.scale_counts)}</div>'
        f"{table('dense', ['linear', *layer.projections], listed, 'numbers')}</div></details>"
        "</section>"
    )


def ids(layer: LayerReport) -> list[str]:
    """Ids of the linears' numbers, in the order of ``layer.errors``."""
    return [cell_id(DENSE, row, column) for row, column in _places(layer)[2]]


def _places(layer: LayerReport) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Dense linears as a map: kinds (rows), layers (columns), and where each linear is."""
    names = [name(layer, i) for i in range(len(layer.errors))]
    kinds = [_NUMBER.sub("N", name, count=1) for name in names]
    layers = [int(found[0]) if (found := _NUMBER.search(name)) else 0 for name in names]
    rows, columns = list(dict.fromkeys(kinds)), sorted(set(layers))
    row_of = {kind: i for i, kind in enumerate(rows)}
    column_of = {layer: i for i, layer in enumerate(columns)}
    places = [(row_of[k], column_of[n]) for k, n in zip(kinds, layers, strict=True)]
    return rows, [str(n) for n in columns], places
