"""What quantizing one weight lost."""

from __future__ import annotations

from typing import Any, NamedTuple


class WeightError(NamedTuple):
    """What quantizing one weight lost.

    Attributes:
        module: the weight's module path.
        noise: ``sum((dequantized - weight) ** 2)``.
        signal: ``sum(weight ** 2)``.
        counts: how many of its blocks have the scale of each E4M3 bit pattern, 127 numbers.
    """

    module: str
    noise: float
    signal: float
    counts: list[int]


def weight_errors(entries: Any) -> dict[str, WeightError]:
    """What JSON says of weights, by module path.

    Raises:
        ValueError, TypeError, LookupError: if it does not.
    """
    return {entry[0]: _weight_error(*entry) for entry in entries}


def _weight_error(module: Any, noise: Any, signal: Any, counts: Any) -> WeightError:
    if isinstance(module, str) and isinstance(counts, list):
        return WeightError(module, float(noise), float(signal), [int(n) for n in counts])
    raise TypeError
