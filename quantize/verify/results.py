"""What ``verify`` finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Lost(NamedTuple):
    """What quantizing one weight lost: ``sum((dequantized - weight) ** 2)``, ``sum(weight ** 2)``,
    and how many blocks have the scale of each E4M3 bit pattern, int64 ``[127]``; and the name of
    the file that holds it."""

    module: str
    noise: float
    signal: float
    counts: Any
    file: str = ""

    @property
    def relative(self) -> float:
        """``norm(dequantized - weight) / norm(weight)``; 0 of a weight that is zero."""
        if self.signal:
            return math.sqrt(self.noise / self.signal)
        return 0.0 if self.noise == 0 else math.inf


class Worst(NamedTuple):
    """The weight of a layer with the largest relative error, and its worst block.

    Attributes:
        module: its module path, which names layer, expert and projection.
        relative: its relative error.
        row: of the weight.
        inputs: the first of the block's 16 inputs.
        block: the block's error, relative to its own norm or to that of the row's average block,
            whichever is larger.
    """

    module: str
    relative: float
    row: int
    inputs: int
    block: float

    def __str__(self) -> str:
        where = f"row {self.row}, inputs {self.inputs} to {self.inputs + 15}"
        return f"{self.module} {self.relative:.4f} ({where}: {self.block:.3f})"


@dataclass(frozen=True)
class LayerError:
    """How far one layer's dequantized experts are from the source's.

    Attributes:
        prefix: the layer's experts.
        relative: ``norm(dequantized - source) / norm(source)``.
        worst: which weight is the worst; None if none of them could be compared.
    """

    prefix: str
    relative: float
    worst: Worst | None = None

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, in dB."""
        return -20 * math.log10(self.relative) if self.relative > 0 else math.inf


@dataclass
class Report:
    """Result of ``verify``; ``problems`` is empty if the checkpoint is good.

    Attributes:
        notes: what was checked less closely than it could be, and why.
    """

    layers: list[LayerError] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values. A number that is not finite is null: the SQNR of no loss."""
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "notes": self.notes,
            "layers": [
                {
                    "prefix": layer.prefix,
                    "relative_error": _finite(layer.relative),
                    "sqnr_db": _finite(layer.sqnr),
                    "worst": {k: _finite(v) for k, v in layer.worst._asdict().items()}
                    if layer.worst
                    else None,
                }
                for layer in self.layers
            ],
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
