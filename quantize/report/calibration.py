"""What calibration saw and what it was good for: of one layer, or of all together."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import chain
from operator import lt

from quantize.report.data import CalibrationReport, ExpertStats, LayerReport


@dataclass(frozen=True)
class Findings:
    """What there is to say of ``stats``.

    Attributes:
        spread: least, median and most tokens.
        undersampled: experts with fewer tokens than ``CalibrationReport.min_tokens``.
        products: names of the experts' two products, with their mean errors before and after.
        rules: each rule with its experts; the calibration's method first, then by name.
        remarkable: names with the experts that they are said of.
    """

    stats: ExpertStats
    spread: tuple[str, str, str]
    undersampled: list[int]
    products: list[tuple[str, float, float]]
    rules: list[tuple[str, list[int]]]
    remarkable: list[tuple[str, list[int]]]


def findings(settings: CalibrationReport, layers: list[LayerReport]) -> Findings:
    """Summarise what calibration found in all calibrated ``layers``."""
    found = [layer.calibration for layer in layers if layer.calibration]
    stats = ExpertStats(
        list(chain.from_iterable(own.tokens for own in found)),
        list(chain.from_iterable(own.rules for own in found)),
        list(chain.from_iterable(own.before for own in found)),
        list(chain.from_iterable(own.after for own in found)),
    )
    inputs = dict.fromkeys(name for layer in layers for name in layer.projections[:-1])
    undersampled = [expert for expert, n in enumerate(stats.tokens) if n < settings.min_tokens]
    rules = sorted(set(stats.rules), key=lambda rule: (rule != settings.method, rule))
    pairs = list(enumerate(zip(stats.before, stats.after, strict=True)))
    unknown = [expert for expert, (b, a) in pairs if any(map(math.isnan, (*b, *a)))]
    worse = [expert for expert, (b, a) in pairs if any(map(lt, b, a))]
    remarkable = [
        (f"below {settings.min_tokens}", undersampled),
        ("no output", unknown),
        ("worse after", worse),
    ]
    return Findings(
        stats,
        _spread(stats.tokens),
        undersampled,
        [
            (name, _mean(stats.before, product), _mean(stats.after, product))
            for product, name in enumerate((", ".join(inputs), "down"))
        ],
        [(rule, [e for e, own in enumerate(stats.rules) if own == rule]) for rule in rules],
        [(name, experts) for name, experts in remarkable if experts],
    )


def _spread(tokens: list[int]) -> tuple[str, str, str]:
    if not tokens:
        return ("\N{EN DASH}",) * 3
    median = f"{statistics.median(tokens):,.1f}".removesuffix(".0")
    return f"{min(tokens):,}", median, f"{max(tokens):,}"


def _mean(errors: list[list[float]], product: int) -> float:
    """Over the experts that have a number for ``product``; NaN if none has."""
    known = [own[product] for own in errors if not math.isnan(own[product])]
    return statistics.fmean(known) if known else math.nan
