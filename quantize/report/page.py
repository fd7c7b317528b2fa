"""The page: ``page.html.j2`` with the run's data, and how it writes numbers."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import groupby
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from quantize.duration import duration
from quantize.nvfp4.rounding import METHODS
from quantize.report import heatmap, histogram
from quantize.report.calibration import findings
from quantize.report.data import RunReport, dumps
from quantize.report.findings import FAR, LOW, NAMES, Kind, root_mean_square
from quantize.report.grid import of_experts, of_linears
from quantize.report.verdict import judge
from quantize.run.report_files import mark

if TYPE_CHECKING:
    from jinja2 import Template


def render(run: RunReport) -> str:
    """The whole page, a function of ``run`` alone; it can be encoded whatever the names hold."""
    from markupsafe import Markup

    folder = Path(__file__).parent
    page = _template().render(
        _context(run),
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        js=Markup((folder / "page.js").read_text(encoding="utf-8")),
        mark=Markup(mark(run.fingerprint, dumps(run).encode())),
    )
    return page.encode("utf-8", "replace").decode()


@cache
def _template() -> Template:
    """The page's, compiled: a process may render many."""
    # Here and not above: a command that writes no report need not load it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "error": _error,
        "plural": _plural,
        "size": decimal,
        "change": _change,
        "counted": _counted,
        "duration": duration,
        "share": _share,
        "tick": lambda error: f"{error:.4f}" if error >= 0.001 else f"{error:.2e}",
    }
    return environment.get_template("page.html.j2")


def _context(run: RunReport) -> dict[str, Any]:
    experts = of_experts(run.layers)
    linears = of_linears(run.dense) if run.dense else None
    method = METHODS.get(run.calibration.method) if run.calibration else None
    return {
        "run": run,
        "name": PurePath(run.target).name or run.target,
        "experts_grid": experts,
        "linears_grid": linears,
        "verdict": judge([experts, linears] if linears else [experts], run.calibration),
        "gates": Counter(layer.gate for layer in run.layers),
        "sizes": _sizes(run),
        "decibels": -20 * math.log10(experts.scale.median) if experts.scale.median > 0 else 0,
        "findings": findings,
        "weighted": method is not None and method.needs_output_hessian,
        "nonzero": lambda counts: [i for i, count in enumerate(counts) if count],
        "value": histogram.value,
        "label": histogram.label,
        "known": lambda layer: sorted(e for row in layer.errors for e in row if e == e),
        "palette": heatmap.palette(),
        "paths": heatmap.paths,
        "every_nth": heatmap.every_nth,
        "root_mean_square": root_mean_square,
        "FAR": FAR,
        "LOW": LOW,
        "Kind": Kind,
        "NAMES": NAMES,
    }


def _sizes(run: RunReport) -> list[tuple[str, int, int]]:
    """What the checkpoint consists of: name, bytes before and after."""
    parts = {"experts": run.layers} | ({"dense linears": [run.dense]} if run.dense else {})
    sizes = [
        (name, sum(x.bytes_before for x in layers), sum(x.bytes_after for x in layers))
        for name, layers in parts.items()
    ]
    if run.base:
        name = f"linears in {run.base.format.upper()}"
        sizes.append((name, run.base.bytes_before, run.base.bytes_after))
    for name, layers in groupby(
        sorted(run.bits.experts if run.bits else (), key=lambda one: one.format),
        key=lambda one: one.format,
    ):
        of = list(layers)
        sizes.append(
            (
                f"experts in {name.upper()}",
                sum(one.bytes_before for one in of),
                sum(one.bytes_after for one in of),
            )
        )
    before = run.bytes_before - sum(size for _, size, _ in sizes)
    after = run.bytes_after - sum(size for *_, size in sizes)
    return [*sizes, ("all else", max(before, 0), max(after, 0))]


def _error(error: float) -> str:
    """A relative error, to four digits; NaN and 0 in words."""
    if math.isnan(error):
        return "all zero"
    return f"{error:#.4g}" if error else "0 (exact)"


def _plural(count: int, noun: str) -> str:
    """``1 expert``, ``1,024 experts``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _counted(names: list[str]) -> list[str]:
    """Each name once, with how often it comes: ``8 x NVIDIA H200``."""
    return [f"{n} \N{MULTIPLICATION SIGN} {name}" if n > 1 else name
            for name, n in Counter(names).items()]  # fmt: skip


def _change(after: float, before: float) -> str:
    """The change in percent; empty if ``before`` is zero or infinite."""
    if not 0 < before < math.inf:
        return ""
    return f" ({100 * (after / before - 1):+.1f}%)".replace("-", "\N{MINUS SIGN}")


def _share(count: int, total: int) -> str:
    """A percentage that is 0 only for a count of 0."""
    percent = 100 * count / total if total else 0.0
    return "<0.01%" if 0 < percent < 0.01 else f"{percent:.2f}%" if percent else "0%"
