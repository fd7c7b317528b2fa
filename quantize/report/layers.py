"""One row a layer; opened, the numbers of its experts and the histogram of its block scales."""

from __future__ import annotations

import math
from collections import Counter

from quantize.report.data import LayerReport, combined
from quantize.report.findings import COMBINED, NAMES, Kind, Yardstick
from quantize.report.heatmap import EXPERTS, cell_id
from quantize.report.histogram import histogram, sparkline
from quantize.report.markup import number, plural, size, table, text


def section(layers: list[LayerReport], scale: Yardstick) -> str:
    """The list of all ``layers``."""
    rows = [_layer(row, layer, scale) for row, layer in enumerate(layers)]
    heads = "".join(
        f"<span>{name}</span>"
        for name in (
            "layer",
            "block scales",
            "error: least, median, largest",
            "size",
            "",
        )
    )
    return (
        '<section class="card"><h2>Layers</h2><p class="about">Open one for the numbers of its '
        "experts and the histogram of its block scales.</p>"
        f'<div class="head" aria-hidden="true">{heads}</div>{"".join(rows)}</section>'
    )


def _layer(row: int, layer: LayerReport, scale: Yardstick) -> str:
    kinds = Counter(cell.kind for cell in scale.combined(row, layer))
    chips = "".join(
        f'<b class="chip {kind.value}">{kinds[kind]} {name}</b>'
        for kind, name in NAMES.items()
        if kinds[kind]
    )
    found = sorted(e for errors in layer.errors for e in errors if not math.isnan(e))
    spread = (
        f"{found[0]:.4f} <b>{found[len(found) // 2]:.4f}</b> {found[-1]:.4f}"
        if found
        else "all zero"
    )
    given = layer.given
    more: list[tuple[str, ...]] = [()] * len(layer.errors)
    if given:
        more = [(f"{n:,}", rule) for n, rule in zip(given.tokens, given.rules, strict=True)]
    experts = [
        numbers(cell_id(EXPERTS, row, expert), str(expert), errors, layer, scale, own)
        for expert, (errors, own) in enumerate(zip(layer.errors, more, strict=True))
    ]
    heads = ["expert", COMBINED, *layer.projections, *(("tokens", "rule") if given else ())]
    return (
        f'<details><summary><span class="name">{text(layer.prefix)}</span>'
        f"<span>{sparkline(layer.scale_counts)}</span><span>{spread}</span>"
        f"<span>{size(layer.bytes_before)} → {size(layer.bytes_after)}</span>"
        f'<span>{chips}</span></summary><div class="inside" id="layer-{row}"><div>'
        f"{histogram(layer.prefix, layer.scale_counts)}"
        f"<p>{plural(sum(layer.scale_counts), 'block scale')}, one per 16 weights. Bars' areas are "
        "shares.</p>"
        f"<p>Gate: <code>{text(layer.gate)}</code></p></div>"
        f"{table(f'layer {layer.label}', heads, experts, 'numbers')}</div></details>"
    )


def numbers(
    row_id: str,
    name: str,
    errors: tuple[float, ...],
    layer: LayerReport,
    scale: Yardstick,
    more: tuple[str, ...] = (),
) -> str:
    """A row of numbers, found by its id from the maps; ``more`` cells at its end."""
    cells = []
    for projection, error in zip(layer.projections, errors, strict=True):
        kind = scale.kind(projection, error)
        mark = "" if kind is Kind.FINE else f' class="{kind.value}"'
        cells.append(f"<td{mark}>{number(error)}</td>")
    every = f"<td>{number(combined(errors))}</td>" if len(errors) > 1 else ""
    cells += [f"<td>{text(said)}</td>" for said in more]
    return f'<tr id="{row_id}"><th>{text(name)}</th>{every}{"".join(cells)}</tr>'
