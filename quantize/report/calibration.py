"""What calibration saw and what it was good for: tokens, rules and output errors by layer.

The numbers of each expert are in the list of layers (``quantize.report.layers``), where the charts
lead; here are their distributions, means, and the experts to look at.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from itertools import chain

from quantize.nvfp4.rounding import METHODS
from quantize.report.data import CalibrationReport, Experience, LayerReport
from quantize.report.heatmap import EXPERTS, cell_id, step
from quantize.report.markup import number, plural, text

_UNITS = 200
"""Height of the largest count in a skyline's own units, which are stretched to pixels."""
_SEEN = 8
"""Units that an expert with few tokens has at least."""


def facts(calibration: CalibrationReport) -> str:
    """The settings in a line, as HTML."""
    given = "all of them" if calibration.every_expert else "those routed to it"
    return (
        f"<code>{text(calibration.method)}</code>, {calibration.rows:,} &times; "
        f"{calibration.length:,} tokens of <code>{text(calibration.text)}</code>, each expert "
        f"given {given}"
    )


def section(calibration: CalibrationReport, plain: str, layers: list[LayerReport]) -> str:
    """All of ``layers`` together, and one by one; nothing if none is calibrated.

    Args:
        plain: the scale rule that calibration is compared with.
    """
    found = [(row, layer, layer.given) for row, layer in enumerate(layers) if layer.given]
    if not found:
        return ""
    every = Experience(
        [n for *_, given in found for n in given.tokens],
        [rule for *_, given in found for rule in given.rules],
        [errors for *_, given in found for errors in given.before],
        [errors for *_, given in found for errors in given.after],
    )
    inputs = list(chain.from_iterable(layer.projections[:-1] for _, layer, _ in found))
    heads = "".join(
        f"<span>{name}</span>"
        for name in (
            "layer",
            "tokens routed to each",
            "tokens: least, median, most",
            "output error: before → after",
            "experts",
        )
    )
    fallback = (
        "Counted are the tokens that the router sent it."
        if calibration.every_expert
        else f"An expert with fewer than {calibration.few} is rounded to nearest instead, and has "
        "its layer's input scales."
    )
    over = "all tokens" if calibration.every_expert else "its tokens, each with its router weight"
    if METHODS[calibration.method].needs_output_hessian:
        over += ", and each direction with the size of the loss's gradient along it"
    return (
        '<section class="card calibration"><h2>Calibration</h2>'
        f'<p class="about">{facts(calibration)}. {fallback} Output error is <i>‖output of the '
        f"quantized weights &minus; output‖ / ‖output‖</i> of an expert's products over {over}: "
        "before, under the rule "
        f"<code>{text(plain)}</code> without calibration, and after; means over experts. "
        "The errors of the weights themselves may be larger than without calibration.</p>"
        f'<div class="head" aria-hidden="true">{heads}</div>'
        '<div class="total"><b>all layers</b><span></span>'
        f"{_spans(calibration, every, inputs)}</div>"
        f"{''.join(_layer(calibration, *each) for each in found)}</section>"
    )


def _layer(calibration: CalibrationReport, row: int, layer: LayerReport, given: Experience) -> str:
    few = [expert for expert, n in enumerate(given.tokens) if n < calibration.few]
    strip = (
        f'<svg class="spark" aria-hidden="true" width="150" height="23" viewBox="0 0 150 23">'
        f"{_skyline(given.tokens, few, 150, 22)}</svg>"
    )
    return (
        f'<details id="calibration-{row}"><summary><span class="name">{text(layer.prefix)}</span>'
        f"<span>{strip}</span>{_spans(calibration, given, layer.projections[:-1])}</summary>"
        f'<div class="inside">{_chart(row, layer.prefix, given.tokens, few, calibration.few)}'
        f"{_lists(calibration, row, given, few)}</div></details>"
    )


def _spans(calibration: CalibrationReport, given: Experience, inputs: Iterable[str]) -> str:
    """Tokens, output errors and rules of one row."""
    least, median, most = spread(given.tokens)
    few = sum(n < calibration.few for n in given.tokens)
    chip = f'<br><b class="chip few">{few:,} below {calibration.few}</b>' if few else ""
    names = ", ".join(dict.fromkeys(inputs)), "down"
    errors = "<br>".join(
        f"{text(name)} {_pair(mean(given.before, product), mean(given.after, product))}"
        for product, name in enumerate(names)
    )
    rules = "<br>".join(
        f"{n:,} {text(rule)}"
        if rule == calibration.method
        else f'<b class="chip few">{n:,} {text(rule)}</b>'
        for rule, n in _rules(calibration, given)
    )
    return (
        f"<span>{least} <b>{median}</b> {most}{chip}</span><span>{errors}</span>"
        f"<span>{rules}</span>"
    )


def _lists(calibration: CalibrationReport, row: int, given: Experience, few: list[int]) -> str:
    """Which experts, wherever it is not all of them as it should be."""
    rules = list(enumerate(given.rules))
    lines = [
        (
            text(rule),
            plural(n, "expert")
            if rule == calibration.method
            else _experts(row, [expert for expert, own in rules if own == rule]),
        )
        for rule, n in _rules(calibration, given)
    ]
    pairs = list(zip(given.before, given.after, strict=True))
    worse = [
        expert
        for expert, (before, after) in enumerate(pairs)
        if any(b < a for b, a in zip(before, after, strict=True))
    ]
    unknown = [
        expert
        for expert, (before, after) in enumerate(pairs)
        if any(map(math.isnan, (*before, *after)))
    ]
    for name, experts in (
        (f"below {calibration.few}", few),
        ("no output", unknown),
        ("worse after", worse),
    ):
        if experts:
            lines.append((name, _experts(row, experts)))
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{said}</dd>' for name, said in lines)}</dl>"


def _experts(row: int, experts: list[int]) -> str:
    links = ", ".join(f'<a href="#{cell_id(EXPERTS, row, e)}">{e}</a>' for e in experts)
    return f"{plural(len(experts), 'expert')}: {links}"


def _rules(calibration: CalibrationReport, given: Experience) -> list[tuple[str, int]]:
    """Each rule with its number of experts: the method first, then by name."""
    counts = Counter(given.rules)
    return sorted(counts.items(), key=lambda item: (item[0] != calibration.method, item[0]))


def spread(tokens: list[int]) -> tuple[str, str, str]:
    """Least, median and most."""
    if not tokens:
        return ("&ndash;",) * 3
    median = f"{statistics.median(tokens):,.1f}".removesuffix(".0")
    return f"{min(tokens):,}", median, f"{max(tokens):,}"


def mean(errors: list[list[float]], product: int) -> float:
    """Over the experts that have a number for ``product``; NaN if none has."""
    known = [own[product] for own in errors if not math.isnan(own[product])]
    return statistics.fmean(known) if known else math.nan


def _pair(before: float, after: float) -> str:
    if math.isnan(before) or math.isnan(after):
        return "&ndash;"
    change = (
        f" ({100 * (after / before - 1):+.1f}%)".replace("-", "&minus;")
        if 0 < before < math.inf
        else ""
    )
    return f"{number(before)} → <b>{number(after)}</b>{change}"


def _skyline(tokens: list[int], few: list[int], width: int, height: int) -> str:
    """One bar an expert, those with few tokens on a shade of their own."""
    top = max(tokens, default=0) or 1
    tall = [round(_UNITS * n / top) for n in tokens]
    outline = "".join(f"V{_UNITS - h}h1" for h in tall)
    scale = f"scale({width / max(len(tokens), 1):.6g} {height / _UNITS:.6g})"
    parts = [f'<path class="bar" d="M0 {_UNITS}{outline}V{_UNITS}z"/>']
    if few:
        columns = "".join(f"M{e} 0h1v{_UNITS}h-1z" for e in few)
        bars = "".join(f"M{e} {_UNITS}v-{max(tall[e], _SEEN)}h1V{_UNITS}z" for e in few)
        parts = [
            f'<path class="few-page" d="{columns}"/>',
            *parts,
            f'<path class="few" d="{bars}"/>',
        ]
    if tokens and width / len(tokens) >= 6:
        lines = "".join(f"M{e} 0v{_UNITS}" for e in range(1, len(tokens)))
        parts.append(f'<path class="grid" vector-effect="non-scaling-stroke" d="{lines}"/>')
    return (
        f'<g transform="{scale}">{"".join(parts)}</g>'
        f'<path class="axis" d="M0 {height + 0.5}h{width}"/>'
    )


def _chart(row: int, name: str, tokens: list[int], few: list[int], limit: int) -> str:
    """The skyline with words; the page's script finds an expert's numbers by its place."""
    width, height, top = 520, 130, 18
    least, median, most = spread(tokens)
    alt = (
        f"Tokens of each expert of {name}: least {least}, median {median}, most {most}; "
        f"{len(few)} of {len(tokens)} with fewer than {limit}"
    )
    w = width / max(len(tokens), 1)
    average = statistics.fmean(tokens) if tokens else 0.0
    y = height * (1 - average / (max(tokens, default=0) or 1))
    ticks = "".join(
        f'<text class="tick" x="{(e + 0.5) * w:.1f}" y="{height + 16}">{e}</text>'
        for e in range(0, len(tokens), step(w, 26))
    )
    return (
        f'<figure class="wide"><svg class="coverage" role="img" aria-label="{text(alt)}"'
        f' width="{width}" height="{top + height + 38}" data-key="{EXPERTS}" data-x="0"'
        f' data-y="{top - row * height}" data-w="{w:.6g}" data-h="{height}">'
        f'<text class="note" x="0" y="11">up to {most} tokens</text>'
        f'<text x="{width}" y="11">dashed: mean, {average:,.1f}</text>'
        f'<g transform="translate(0 {top})">{_skyline(tokens, few, width, height)}'
        f'<path class="axis" stroke-dasharray="4 3" d="M0 {y:.1f}h{width}"/>{ticks}'
        f'<text class="tick" x="{width / 2:g}" y="{height + 32}">expert</text></g></svg></figure>'
    )
