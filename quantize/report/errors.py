"""The heat maps of all experts, and the worst of them."""

from __future__ import annotations

from quantize.report.data import LayerReport
from quantize.report.findings import Cell, Kind, Yardstick
from quantize.report.heatmap import EXPERTS, Axes, cell_id, heatmap, legend
from quantize.report.markup import number, table, text

_WORST = 8


def section(layers: list[LayerReport], scale: Yardstick) -> str:
    """A map of all projections together, one of each, and a table of the largest errors."""
    axes = Axes(
        EXPERTS,
        _labels(layers),
        [str(i) for i in range(max(1, *(len(layer.errors) for layer in layers)))],
        [f"layer-{row}" for row in range(len(layers))],
        ("layer", "expert"),
    )
    every = [cell for row, layer in enumerate(layers) for cell in scale.combined(row, layer)]
    cells = [cell for row, layer in enumerate(layers) for cell in scale.cells(row, layer)]
    projections = dict.fromkeys(cell.projection for cell in cells)
    small = "".join(
        heatmap(name, axes, [c for c in cells if c.projection == name], scale, 336)
        for name in projections
    )
    return (
        '<section class="card"><h2>Relative error of each expert</h2>'
        '<p class="about"><i>‖dequantized &minus; original‖ / ‖original‖</i>, without a unit: '
        "0.1 is 20 dB of signal to noise. Rows are layers, columns experts. Gaussian weights "
        "have 0.095 under the rule <code>max</code> and 0.081 under <code>mse</code>.</p>"
        + legend(scale, cells)
        + heatmap("all projections, root mean square", axes, every, scale, 1064)
        + f'<div class="small">{small}</div>'
        + _worst(layers, scale, cells)
        + "</section>"
    )


def _labels(layers: list[LayerReport]) -> list[str]:
    labels = [layer.label for layer in layers]
    return labels if len(set(labels)) == len(labels) else [layer.prefix for layer in layers]


def _worst(layers: list[LayerReport], scale: Yardstick, cells: list[Cell]) -> str:
    worst = sorted(
        (cell for cell in cells if cell.kind in (Kind.FINE, Kind.FAR)), key=lambda c: -c.error
    )[:_WORST]
    rows = [
        f'<tr class="{c.kind.value}"><td><a href="#layer-{c.row}">'
        f"{text(layers[c.row].prefix)}</a></td>"
        f'<td><a href="#{cell_id(EXPERTS, c.row, c.column)}">{c.column}</a></td>'
        f"<td>{text(c.projection)}</td><td>{number(c.error)}</td>"
        f"<td>{scale.times(c)}</td></tr>"
        for c in worst
    ]
    heads = ["layer", "expert", "projection", "relative error", "of its median"]
    return table("Largest errors", heads, rows, "worst")
