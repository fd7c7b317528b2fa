"""What is usual in a run, and what is not: an error is judged by the run's own median.

NVFP4 leaves nearly the same relative error in every weight (0.095 for Gaussian ones under the
``max`` rule, 0.081 under ``mse``), so a weight far above the others deserves a look whatever its
model. A projection is compared with the same projection elsewhere: down may differ from gate.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from quantize.nvfp4.format import IMPLAUSIBLE
from quantize.report.data import LayerReport

FAR = 0.25
"""How far above its projection's median an error may be, as a part of the median."""

LOW = 0.5
"""An error below this part of its projection's median is remarkable too: rounding does not come out
so much better, so a few huge values make up the weight's norm, and the others may be lost."""

COMBINED = "combined"


class Kind(Enum):
    """How a cell is shown. A cell of kind ``FINE`` gets a colour by its error."""

    FINE = "fine"
    FAR = "far"
    LOW = "low"
    ZERO = "zero"
    EXACT = "exact"


NAMES = {Kind.FAR: "far above", Kind.LOW: "far below", Kind.ZERO: "all zero", Kind.EXACT: "exact"}
"""What the page calls the remarkable kinds, gravest first."""


@dataclass(frozen=True)
class Cell:
    """One error; ``layer`` and ``expert`` (or linear) are positions in the report."""

    layer: int
    expert: int
    projection: str
    error: float
    kind: Kind


class ErrorScale:
    """The medians of the errors of ``layers``, and the ends of their colour scale.

    Attributes:
        median: of all errors but zeros; NaN if there are none.
        medians: the same, by projection.
        low, high: the errors that get the first and the last colour.
    """

    def __init__(self, layers: list[LayerReport]) -> None:
        by_projection: dict[str, list[float]] = defaultdict(list)
        for layer in layers:
            for errors in layer.errors:
                for projection, error in zip(layer.projections, errors, strict=True):
                    if math.isfinite(error) and error > 0:
                        by_projection[projection].append(error)
        self.medians = {name: statistics.median(found) for name, found in by_projection.items()}
        every = [error for found in by_projection.values() for error in found]
        self.median = statistics.median(every) if every else math.nan
        fine = [
            abs(error / self.median - 1)
            for name, found in by_projection.items()
            for error in found
            if self.kind(name, error) is Kind.FINE
        ]
        # At least 5 %: noise must not look like news. At most FAR: one projection's large errors
        # must not hide the differences between the others.
        spread = min(max(0.05 * math.ceil(20 * max(fine, default=0.0) - 1e-9), 0.05), FAR)
        self.low, self.high = self.median * (1 - spread), self.median * (1 + spread)

    def kind(self, projection: str, error: float) -> Kind:
        """How to show one projection's ``error``."""
        if math.isnan(error):
            return Kind.ZERO
        if error == 0:
            return Kind.EXACT
        median = self.medians.get(projection)
        if error > min((median or math.inf) * (1 + FAR), IMPLAUSIBLE):
            return Kind.FAR
        return Kind.LOW if median and error < median * LOW else Kind.FINE

    def position(self, error: float) -> float:
        """Where ``error`` is between ``low`` (0) and ``high`` (1); those beyond are at the end."""
        return min(max((error - self.low) / (self.high - self.low), 0.0), 1.0)

    def cells(self, layers: Sequence[LayerReport]) -> Iterator[Cell]:
        """Yield a cell for each projection of each expert."""
        for number, layer in enumerate(layers):
            for expert, errors in enumerate(layer.errors):
                for projection, error in zip(layer.projections, errors, strict=True):
                    yield Cell(number, expert, projection, error, self.kind(projection, error))

    def combined(self, layers: Sequence[LayerReport]) -> Iterator[Cell]:
        """Yield a cell for each expert, of the kind of its most remarkable projection."""
        for number, layer in enumerate(layers):
            for expert, errors in enumerate(layer.errors):
                kinds = {self.kind(*both) for both in zip(layer.projections, errors, strict=True)}
                kind = next((k for k in (Kind.FAR, Kind.LOW, Kind.ZERO) if k in kinds), Kind.FINE)
                if kinds == {Kind.EXACT}:
                    kind = Kind.EXACT
                yield Cell(number, expert, COMBINED, root_mean_square(errors), kind)

    def projections(self, layers: Sequence[LayerReport]) -> list[str]:
        """All that ``layers`` have, in their order."""
        return list(dict.fromkeys(name for layer in layers for name in layer.projections))

    def times(self, cell: Cell) -> str:
        """The cell's error as a multiple of its projection's median."""
        median = self.medians.get(cell.projection)
        if not median:
            return "\N{EN DASH}"
        times = cell.error / median
        return f"{'<0.01' if 0 < times < 0.005 else f'{times:.2f}'} \N{MULTIPLICATION SIGN}"


def root_mean_square(errors: tuple[float, ...]) -> float:
    """The root mean square of one expert's ``errors``; NaN if one of its weights is all zero."""
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else math.nan
