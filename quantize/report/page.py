"""The page: sections, from what an operator looks at first to the last number."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import PurePath

from quantize.report import calibration, dense, errors, layers, verdict
from quantize.report.data import RunReport
from quantize.report.findings import Yardstick
from quantize.report.markup import number, plural, size, text
from quantize.report.style import CSS, JS


def render(run: RunReport) -> str:
    """The whole page, a function of ``run`` alone."""
    scale = Yardstick(run.layers)
    linears = Yardstick([run.dense] if run.dense else [])
    name = PurePath(run.target).name or run.target
    sections = [
        _header(run, name),
        verdict.section(run, scale, linears),
        _tiles(run, scale),
        errors.section(run.layers, scale) if run.layers else "",
        calibration.section(run.calibration, run.scales, run.layers) if run.calibration else "",
        dense.section(run.dense, linears) if run.dense else "",
        layers.section(run.layers, scale) if run.layers else "",
        _facts(run),
    ]
    body = "".join(f"{part}\n" for part in sections if part)
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{text(name)}: NVFP4 MoE report</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"{_HATCH}<main>\n{body}</main>\n"
        f'<div id="tip" hidden></div>\n<script>{JS}</script>\n</body>\n</html>\n'
    )


_HATCH = (
    '<svg class="defs" aria-hidden="true" width="0" height="0"><defs>'
    '<pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse"'
    ' patternTransform="rotate(45)"><rect class="paper" width="5" height="5"/>'
    '<rect class="ink" width="2" height="5"/></pattern></defs></svg>\n'
)


def _header(run: RunReport, name: str) -> str:
    facts = _setup(run)
    return (
        f'<header><p class="kicker">NVFP4 mixture of experts</p><h1>{text(name)}</h1>'
        f'<p class="from">from <code>{text(run.source)}</code></p><p class="setup">'
        f"{''.join(f'<b><span>{what}</span>{value}</b>' for what, value in facts)}</p></header>"
    )


def _setup(run: RunReport) -> list[tuple[str, str]]:
    """Names and values, as HTML, of what the output depends on."""
    facts = [("Gate", _gates(run)), ("Layout", text(run.layout)), ("Scale rule", text(run.scales))]
    if run.calibration:
        facts[-1] = ("Scale rule", f"{text(run.scales)} without calibration")
        facts.append(("Calibration", calibration.facts(run.calibration)))
    return facts


def _gates(run: RunReport) -> str:
    """The gate; where layers differ, each with how many have it."""
    gates = Counter(layer.gate for layer in run.layers)
    return ", ".join(
        f"<code>{text(gate)}</code>" + (f" in {plural(n, 'layer')}" if len(gates) > 1 else "")
        for gate, n in gates.items()
    )


def _tiles(run: RunReport, scale: Yardstick) -> str:
    experts = sum(len(layer.errors) for layer in run.layers)
    moe = [sum(x.bytes_before for x in run.layers), sum(x.bytes_after for x in run.layers)]
    flat = [run.dense.bytes_before, run.dense.bytes_after] if run.dense else [0, 0]
    rows = []
    for name, total, part, linears in (
        ("before", run.bytes_before, moe[0], flat[0]),
        ("after", run.bytes_after, moe[1], flat[1]),
    ):
        full = max(run.bytes_before, run.bytes_after, 1)
        pieces = (("moe", part), ("linear", linears), ("rest", max(total - part - linears, 0)))
        bars = "".join(
            f'<i class="{kind}" style="width:{100 * n / full:.2f}%"></i>' for kind, n in pieces if n
        )
        rows.append(
            f"<tr><th>{name}</th><td>{size(total)}</td>"
            f'<td class="bars" aria-hidden="true"><div>{bars}</div></td></tr>'
        )
    parts = [("moe", "experts", moe)]
    parts += [("linear", "dense linears", flat)] if run.dense else []
    rest = [run.bytes_before - moe[0] - flat[0], run.bytes_after - moe[1] - flat[1]]
    parts.append(("rest", "all else", [max(n, 0) for n in rest]))
    key = "".join(
        f'<li><i class="{kind}"></i>{name} {size(b)} → {size(a)}</li>'
        for kind, name, (b, a) in parts
    )
    decibels = f"{-20 * math.log10(scale.median):.1f} dB" if scale.median > 0 else ""
    return (
        '<section class="tiles">'
        + _tile("Checkpoint", _ratio(run.bytes_before, run.bytes_after), "smaller")
        + _tile("Experts", _ratio(*moe), "smaller")
        + _tile("Median relative error", number(scale.median) if decibels else "&ndash;", decibels)
        + _tile("Routed experts", f"{experts:,}", f"in {plural(len(run.layers), 'layer')}")
        + f'<div class="tile sizes"><table>{"".join(rows)}</table><ul class="key">{key}</ul></div>'
        "</section>"
    )


def _tile(title: str, value: str, unit: str) -> str:
    return (
        f'<div class="tile"><h3>{title}</h3><p class="big">{value} <small>{unit}</small></p></div>'
    )


def _ratio(before: int, after: int) -> str:
    return f"{before / after:.2f}&times;" if after else "&ndash;"


def _facts(run: RunReport) -> str:
    versions = ", ".join(f"{text(name)} {text(value)}" for name, value in run.versions.items())
    rows = "".join(
        f"<dt>{name}</dt><dd>{value}</dd>"
        for name, value in (
            *_setup(run),
            ("Source", f"<code>{text(run.source)}</code>"),
            ("Target", f"<code>{text(run.target)}</code>"),
            ("Command", f"<pre><code>{text(run.command)}</code></pre>"),
            ("Versions", versions),
        )
    )
    return f'<section class="card"><h2>The run</h2><dl>{rows}</dl></section>'
