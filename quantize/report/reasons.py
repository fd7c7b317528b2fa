"""Why experts are off, as far as a run's data tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from quantize.report.data import CalibrationReport, LayerReport
from quantize.report.findings import Kind

_SUBNORMAL = slice(1, 8)
"""Bit patterns of E4M3 block scales that have fewer than four significant bits."""

_MANY = 0.01
"""A part of a layer's block scales that is more than ordinary weights have."""

_SHOWN = 3
"""Experts of a finding that are spoken of one by one."""


def reasons(
    kind: Kind, layer: LayerReport, experts: Iterable[int], used: CalibrationReport | None
) -> Iterator[str]:
    """Sentences on why some experts, or linears, of a layer are of this kind."""
    if kind is Kind.ZERO:
        yield "The source has nothing but zeros there."
    elif kind is Kind.EXACT:
        yield "The source's values are such as NVFP4 has."
    elif kind is Kind.LOW:
        yield (
            "A few huge values make up nearly all of the weight, as damaged ones do: what is "
            "beside them may be lost, though the error is small. Look at the source's weight."
        )
    elif kind is Kind.FAR:
        known = [*_of_weights(layer), *_of_calibration(layer, experts, used)]
        yield from known or ["verify SRC DST shows the worst block of the layer."]


def _of_weights(layer: LayerReport) -> Iterator[str]:
    subnormal, total = sum(layer.scale_counts[_SUBNORMAL]), sum(layer.scale_counts)
    if total and subnormal > _MANY * total:
        yield (
            f"{100 * subnormal / total:.0f}% of the layer's block scales are subnormal: a weight "
            "holds values so large that there is no scale left for the small ones."
        )


def _of_calibration(
    layer: LayerReport, experts: Iterable[int], used: CalibrationReport | None
) -> Iterator[str]:
    """A calibrated weight may be far from the source's, and its output close."""
    stats = layer.calibration
    if stats is None or used is None:
        return
    for expert in list(experts)[:_SHOWN]:
        if stats.rules[expert] != used.method:
            continue
        before, after = (math.hypot(*each[expert]) for each in (stats.before, stats.after))
        if math.isfinite(before) and math.isfinite(after):
            yield (
                f"Expert {expert} was rounded for its outputs on {stats.tokens[expert]:,} tokens; "
                f"their error went from {before:.3g} to {after:.3g}."
            )


def starved(layer: LayerReport, used: CalibrationReport | None) -> list[int]:
    """The experts that a calibration left out because text gave them too few tokens."""
    stats = layer.calibration
    if stats is None or used is None:
        return []
    return [
        expert
        for expert, tokens in enumerate(stats.tokens)
        if tokens < used.min_tokens and stats.rules[expert] != used.method
    ]
