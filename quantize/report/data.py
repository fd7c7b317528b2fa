"""What the report is told about a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CalibrationReport:
    """How a run was calibrated.

    Attributes:
        text: where the text is from, as the user said it.
        rows: of tokens; length: of each.
        method: the rule of experts that were given enough tokens.
        every_expert: experts were calibrated with all tokens, not only those routed to them.
        few: tokens below which an expert's own were not relied on.
    """

    text: str
    rows: int
    length: int
    method: str
    every_expert: bool
    few: int


@dataclass(frozen=True)
class Experience:
    """What calibration found of one layer's experts, a list entry each.

    Attributes:
        tokens: that the router sent to the expert.
        rules: how its weights were quantized.
        before, after: relative errors of the outputs of its two products, ``[experts][2]``, without
            calibration and as written; NaN where there was no output.
    """

    tokens: list[int]
    rules: list[str]
    before: list[list[float]]
    after: list[list[float]]


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
        given: what calibration found, if there was any.
    """

    prefix: str
    gate: str
    projections: tuple[str, ...]
    errors: list[tuple[float, ...]]
    scale_counts: list[int]
    bytes_before: int
    bytes_after: int
    names: tuple[str, ...] = ()
    given: Experience | None = None

    @property
    def label(self) -> str:
        """The layer's number, as far as ``prefix`` has one."""
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", self.prefix)
        return numbers[-1] if numbers else self.prefix


@dataclass(frozen=True)
class RunReport:
    """A whole run. ``bytes_before`` and ``bytes_after`` are of the whole checkpoint; with
    ``calibration``, ``scales`` is the rule that it is compared with."""

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
    calibration: CalibrationReport | None = None


def combined(errors: tuple[float, ...]) -> float:
    """Root mean square of one expert's ``errors``; NaN if one of its weights is all zero."""
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else math.nan
