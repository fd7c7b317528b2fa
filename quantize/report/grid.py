"""Rows and columns of heat maps: layers by experts, or kinds of dense linears by layers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from quantize.report.data import LayerReport
from quantize.report.findings import ErrorScale

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Grid:
    """Layers that are shown, and judged, together.

    Attributes:
        key: what the ids of their numbers begin with.
        layers: their reports.
        scale: of their errors.
        axes: what rows and columns are, such as ``("layer", "expert")``.
        rows: labels, top to bottom.
        columns: labels, left to right.
        places: rows and columns of entries that are elsewhere than their layer and number say.
    """

    key: str
    layers: list[LayerReport]
    scale: ErrorScale
    axes: tuple[str, str]
    rows: list[str]
    columns: list[str]
    places: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def place(self, layer: int, expert: int) -> tuple[int, int]:
        """Row and column of an entry."""
        return self.places.get((layer, expert), (layer, expert))

    def id(self, layer: int, expert: int) -> str:
        """Id of the table row with an entry's numbers; the page's script knows this form."""
        row, column = self.place(layer, expert)
        return f"{self.key}{row}-{column}"

    def name(self, layer: int, expert: int) -> str:
        """What an entry is called: an expert by its number, a linear by its module path."""
        names = self.layers[layer].names
        return names[expert] if names else f"expert {expert}"


def of_experts(layers: list[LayerReport]) -> Grid:
    """Layers by experts."""
    labels = [layer.label for layer in layers]
    if len(set(labels)) < len(labels):
        labels = [layer.prefix for layer in layers]
    experts = max((len(layer.errors) for layer in layers), default=0)
    columns = [str(expert) for expert in range(experts)]
    return Grid("e", layers, ErrorScale(layers), ("layer", "expert"), labels, columns)


def of_linears(dense: LayerReport) -> Grid:
    """Kinds of dense linears, as their names without the layer's number have it, by layers."""
    names = dense.names or tuple(f"linear.{i}" for i in range(len(dense.errors)))
    dense = replace(dense, names=names)
    kinds = [_NUMBER.sub("N", name, count=1) for name in names]
    numbers = [int(found[0]) if (found := _NUMBER.search(name)) else 0 for name in names]
    rows, columns = list(dict.fromkeys(kinds)), sorted(set(numbers))
    row_of = {kind: row for row, kind in enumerate(rows)}
    column_of = {number: column for column, number in enumerate(columns)}
    places = {
        (0, i): (row_of[kind], column_of[number])
        for i, (kind, number) in enumerate(zip(kinds, numbers, strict=True))
    }
    labels = [str(number) for number in columns]
    return Grid("d", [dense], ErrorScale([dense]), ("kind", "layer"), rows, labels, places)
