"""What the report is told about a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One layer's experts, or all quantized dense linears.

    Attributes:
        prefix: module path, such as ``model.layers.3.mlp.experts``.
        gate: the experts' gate, as ``str(Gate)`` has it.
        projections: ``("gate", "up", "down")``, ``("up", "down")``, or ``("weight",)`` if dense.
        errors: ``[experts][projections]``, ``norm(dequantized - weight) / norm(weight)``; NaN if
            the weight is all zero.
        scale_counts: ``[127]``, block scales by E4M3 bit pattern.
        bytes_before: of the weights in the source.
        bytes_after: of all that is written for them.
        names: module paths of the rows of ``errors``, if they are not experts 0, 1, ...
    """

    prefix: str
    gate: str
    projections: tuple[str, ...]
    errors: list[tuple[float, ...]]
    scale_counts: list[int]
    bytes_before: int
    bytes_after: int
    names: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The layer's number, as far as ``prefix`` has one."""
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", self.prefix)
        return numbers[-1] if numbers else self.prefix


@dataclass(frozen=True)
class RunReport:
    """A whole run. ``bytes_before`` and ``bytes_after`` are of the whole checkpoint."""

    source: str
    target: str
    command: str
    layout: str
    scales: str
    versions: dict[str, str]
    bytes_before: int
    bytes_after: int
    layers: list[LayerReport]
    dense: LayerReport | None = None


def combined(errors: tuple[float, ...]) -> float:
    """Root mean square of one expert's ``errors``; NaN if one of its weights is all zero."""
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else math.nan
