"""What a checkpoint says of itself: how it was made, and what its report says was lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.sources.nvfp4 import NVFP4
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY
from quantize.experts.names import is_expert
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.scales import RULES
from quantize.report import RunReport, dumps, loads, render
from quantize.report.data import LayerReport
from quantize.run.bits import NVFP4 as NVFP4_FORMAT
from quantize.run.made import ARITHMETIC, FIELD, Made, made
from quantize.run.report_files import REPORT, REPORT_DATA, mark
from quantize.run.version import PACKAGE, VERSIONS, package_version
from quantize.verify.blocks import COLUMNS, ROWS, Bounds
from quantize.verify.results import Lost, Report

CONFIG = "config.json"
DENSE, BASE = "dense linears", "linears in 8 bits"
_TOLERANCE = 1e-5
"""Of the report's errors: they have six digits, and devices sum in different orders."""


@dataclass
class Claims:
    """What the target says of itself.

    Attributes:
        made: how it was made; None if it does not say.
        run: its report; None if it has none.
        foreign: it was converted from NVFP4, and is not compared with that: how its weights were
            rounded, and their scales found, is not known.
    """

    made: Made | None
    run: RunReport | None
    foreign: bool = False
    _layers: dict[str, list[LayerReport]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.run:
            dense = [self.run.dense] if self.run.dense else []
            if self.run.base:
                errors: list[tuple[float, ...]] = [(error,) for error in self.run.base.errors]
                names = tuple(self.run.base.names)
                dense.append(LayerReport(BASE, "", ("weight",), errors, [], 0, 0, names))
            for found in self.run.bits.experts if self.run.bits else ():
                errors = [(error,) for error in found.errors]
                names = tuple(found.names)
                prefix = names[0].rsplit(".", 2)[0] if names else ""
                dense.append(LayerReport(prefix, "", ("weight",), errors, [], 0, 0, names))
            for layer in (*self.run.layers, *dense):  # experts of several sizes have one prefix
                self._layers.setdefault(layer.prefix, []).append(layer)

    @property
    def known(self) -> bool:
        """Whether this package knows the arithmetic that made the checkpoint."""
        made = self.made
        return made is not None and made.arithmetic == ARITHMETIC and not self.foreign

    @property
    def text(self) -> bool:
        """Whether input scales may be others than 1.0."""
        return self.made is None or self.made.text or self.foreign

    def stays_float(self, module: str) -> bool:
        """Whether the activations of an expert's module stay floats, as ``made`` has it, though
        those of others do not."""
        made = self.made
        if made is None or not made.weight_only or not is_expert(module):
            return False
        return made.selection().keeps_floats(module.rsplit(".", 2)[0])

    def rule(self, prefix: str, expert: int | None) -> str | None:
        """The scale rule that alone decides an expert's bits, or without an expert those of the
        dense linears; None if there is none, or it is not known."""
        if self.made is None or not self.known:
            return None
        rule: str | None = self.made.scales
        if self.made.rounding is not None and expert is not None:
            layers = self._layers.get(prefix, [])
            rules = [r for layer in layers if layer.calibration for r in layer.calibration.rules]
            rule = rules[expert] if expert < len(rules) else None
        return rule if rule in RULES else None

    @property
    def global_rule(self) -> str | None:
        """The scale rule that decides the global scales of calibrated weights, if it is known."""
        return "max" if self.known and self.made and self.made.rounding in METHODS else None

    @property
    def bounds(self) -> Bounds:
        """What the rounding of experts may lose."""
        rounding = self.made.rounding if self.made and not self.foreign else ""
        if rounding is None or (rounding in METHODS and not METHODS[rounding].needs_output_hessian):
            return COLUMNS
        return ROWS

    def problems(self, prefix: str, weights: list[Lost]) -> Iterable[str]:
        """What the report says otherwise of a layer's weights, in their order there."""
        layers = self._layers.get(prefix, [])
        if self.foreign:  # the report knows what was lost since NVFP4: nothing
            return
        if not layers:
            if self.run is not None:
                yield f"{REPORT_DATA} does not have {prefix}; quantize again"
            return
        modules = [weight.module for weight in weights]
        if (names := [name for layer in layers for name in layer.names]) and names != modules:
            yield f"{REPORT_DATA} names other linears than are quantized; quantize again"
            return
        said = [error for layer in layers for errors in layer.errors for error in errors]
        if len(said) != len(weights):
            yield f"{REPORT_DATA}: {prefix} has {len(said)} errors for {len(weights)} weights"
            return
        for weight, error in zip(weights, said, strict=True):
            found = weight.relative if weight.signal else math.nan
            if not (
                math.isclose(found, error, rel_tol=_TOLERANCE, abs_tol=1e-12)
                or (math.isnan(found) and math.isnan(error))
            ):
                yield (
                    f"{weight.file}: {weight.module}: relative error {found:.6g}, but "
                    f"{REPORT_DATA} says {error:.6g}: it was changed since it was written; "
                    "quantize again"
                )
        counts = torch.stack([weight.counts for weight in weights]).sum(0).tolist()
        if counts != [sum(c) for c in zip(*(ly.scale_counts for ly in layers), strict=True)]:
            yield (
                f"{prefix}: {REPORT_DATA} counts other block scales (scale_counts) than are stored:"
                " some were changed since they were written; quantize again"
            )


def read_claims(source: Checkpoint | None, target: Checkpoint, report: Report) -> Claims:
    """Read what the target says of itself; note in ``report`` where it contradicts itself.

    Args:
        source: what it is compared with, if anything.
    """
    where = target.folder / CONFIG
    said = None
    try:
        said = made(target.config, str(where))
    except QuantizeError as error:
        report.problems.append(str(error))
    run = _run(target, report, expected=said is not None)
    if said is None and isinstance(target.config.get(KEY), dict) and run is not None:
        report.problems.append(
            f"{where}: no {KEY}.{FIELD}, which says how the checkpoint was made; quantize again"
        )
    if said and run:
        _agree(said, run, report)
    converted = said is not None and said.converted
    claims = Claims(said, run, converted and (source is None or NVFP4.name not in source.formats))
    if claims.foreign:
        report.notes.append(
            "converted from NVFP4: how that was made is not known, so weights are compared with "
            "what rounding can lose, if with anything"
        )
    elif said is None or not claims.known:
        other = "does not say" if said is None else f"was made by version {said.version}"
        report.notes.append(
            f"{where}: how it was made is not known here ({other}), so weights are not compared "
            "bit by bit, but with what rounding can lose"
        )
    elif said.scales not in RULES or said.rounding not in (None, *METHODS):
        report.notes.append(
            f"{where}: the scale rule {said.scales!r} or the rounding {said.rounding!r} is not "
            "known here, so weights are compared with what rounding can lose"
        )
    elif said.rounding is not None:
        report.notes.append(
            f"calibrated ({said.rounding}): weights are compared with what rounding can lose and "
            "with the report, and bit by bit where experts had too little text"
        )
    return claims


def _others(run: RunReport) -> dict[str, str]:
    """The formats of layers' experts that are not NVFP4."""
    every = run.bits.formats if run.bits else {}
    return {prefix: name for prefix, name in every.items() if name != NVFP4_FORMAT}


def _run(target: Checkpoint, report: Report, expected: bool) -> RunReport | None:
    data, page = target.folder / REPORT_DATA, target.folder / REPORT
    for file in (data, page):
        if expected and not file.exists():
            report.problems.append(f"{file} is missing; every run leaves it: quantize again")
    try:
        run = loads(data.read_bytes())
    except (OSError, QuantizeError) as error:
        if expected and data.exists():
            report.problems.append(f"{data}: {error}")
        return None
    if expected:
        report.problems += _page_problems(run, data, page)
    return run


def _page_problems(run: RunReport, data: Path, page: Path) -> Iterator[str]:
    """That data and page are as they were written, of one run.

    The page says at its end of which data it is. What stands above follows from the data too, if
    this version made it.
    """
    content = data.read_bytes()
    if content != dumps(run).encode():
        yield f"{data}: it was changed since it was written; quantize again"
    if not page.exists():
        return
    text = page.read_bytes()
    if not text.endswith(mark(run.fingerprint, content).encode()):
        yield f"{page} and {REPORT_DATA} are not of the same run, or one was changed"
    elif run.versions.get(PACKAGE) == package_version():
        try:
            same = text == render(run).encode()
        except Exception:  # of a report that was changed anything may come
            same = False
        if not same:
            yield f"{page} was changed since it was made of {REPORT_DATA}; quantize again"


def _agree(said: Made, run: RunReport, report: Report) -> None:
    """That ``config.json`` and the report say the same of how the checkpoint was made."""
    pairs = {
        "version": (said.version, run.versions.get(PACKAGE)),
        "layout": (said.layout, run.layout),
        "scales": (said.scales, run.scales),
        "activations": ("nvfp4" if said.activations else "bf16", run.activations),
        "rounding": (said.rounding, run.calibration.method if run.calibration else None),
        "converted": (said.converted, run.converted),
        "text": (said.text, run.input_scales is not None),
        "base": (said.base, run.base.format if run.base else None),
        "bits": (said.bits, run.bits.asked if run.bits else None),
        "formats": (said.formats, _others(run)),
        "weight_only": (said.weight_only, run.weight_only),
        "kv_cache": (said.kv_cache, run.kv_cache),
        "kv_scales": (said.kv_scales or said.kv_carried, bool(run.kv_scales)),
        "linears": (
            said.linears,
            said.linears if run.dense is None or said.converted else True,
        ),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            report.problems.append(
                f"config.json: {KEY}.{FIELD}.{name} is {ours!r}, {REPORT_DATA} says {theirs!r}; "
                "one of them was changed, or is of another run"
            )
    if set(run.versions) != {PACKAGE, *VERSIONS}:
        report.problems.append(
            f"{REPORT_DATA}: versions names {', '.join(run.versions)}; quantize again"
        )
    if run.calibration and run.input_scales and run.calibration != run.input_scales:
        report.problems.append(
            f"{REPORT_DATA}: calibration and input_scales are of one text, but say different "
            "things; quantize again"
        )
    if said.version == package_version() and said.arithmetic != ARITHMETIC:
        report.problems.append(
            f"config.json: {KEY}.{FIELD}.arithmetic is {said.arithmetic}, but version "
            f"{said.version} has {ARITHMETIC}; it was changed"
        )
