"""A run's results as data, and as the JSON of ``nvfp4_moe_report.json``.

The JSON has these classes' attributes under their names, beside ``version``: docs/users/report.md
describes it. A relative error that does not exist is NaN here and ``null`` there.
"""

from __future__ import annotations

import json
import math
import re
import types
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from quantize.errors import QuantizeError
from quantize.run.sessions import Machine, Session

VERSION = 1
"""The version of the JSON format. It changes when a reader of an older version would misunderstand
a newer file."""


@dataclass(frozen=True)
class CalibrationReport:
    """How a run was calibrated.

    Attributes:
        text: where the text is from, as the user said it.
        num_samples: how many samples of text.
        sequence_length: tokens in each sample.
        method: the rounding of experts that were given enough tokens; empty if only the ranges of
            inputs were gathered.
        every_expert: experts were calibrated with all tokens, not only those routed to them.
        min_tokens: an expert with fewer tokens is rounded to nearest instead, and has its layer's
            input scales.
        input_scale_rule: how input scales were found from the experts' inputs.
        digest: SHA-256 of the samples' tokens, int64 ``[num_samples, sequence_length]``, in
            hexadecimal.
    """

    text: str
    num_samples: int
    sequence_length: int
    method: str
    every_expert: bool
    min_tokens: int
    input_scale_rule: str = "max"
    digest: str = ""


@dataclass(frozen=True)
class ExpertStats:
    """What calibration found of one layer's experts, a list entry for each expert.

    Attributes:
        tokens: how many tokens the router sent to the expert.
        rules: how its weights were quantized: the calibration's method, or a scale rule.
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
        gate: the experts' gate, as ``str(Gate)`` has it; empty if dense.
        projections: ``("gate", "up", "down")``, ``("up", "down")``, or ``("weight",)`` if dense.
        errors: ``[experts][projections]``, ``norm(dequantized - weight) / norm(weight)``; NaN if
            the weight is all zero.
        scale_counts: ``[127]``, how many block scales have each E4M3 bit pattern.
        bytes_before: size of the weights in the source, and of the experts' biases.
        bytes_after: size of all that is written for them.
        names: module paths of the linears, if they are not experts 0, 1, ...
        calibration: what calibration found, if there was any.
    """

    prefix: str
    gate: str
    projections: tuple[str, ...]
    errors: list[tuple[float, ...]]
    scale_counts: list[int]
    bytes_before: int
    bytes_after: int
    names: tuple[str, ...] = ()
    calibration: ExpertStats | None = None

    @property
    def label(self) -> str:
        """The layer's number, if ``prefix`` has one."""
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", self.prefix)
        return numbers[-1] if numbers else self.prefix


@dataclass(frozen=True)
class BaseReport:
    """The linears beside the experts that were rounded to 8 bits.

    Attributes:
        format: a key of ``quantize.layouts.base.BASES``.
        names: their module paths.
        errors: of each, ``norm(dequantized - weight) / norm(weight)``; NaN if it is all zero.
        bytes_before, bytes_after: of all of them.
    """

    format: str
    names: list[str]
    errors: list[float]
    bytes_before: int
    bytes_after: int

    @property
    def worst(self) -> int:
        """The number of the one with the largest error."""
        return max(
            range(len(self.errors)), key=lambda i: -1 if math.isnan(e := self.errors[i]) else e
        )


@dataclass(frozen=True)
class BitsReport:
    """The formats that ``--bits`` chose.

    Attributes:
        asked, taken: bits of a weight of the experts, on average: at most, and as it is.
        formats: by a layer's prefix: ``nvfp4``, a key of ``quantize.layouts.base.BASES``, or
            ``bf16``.
        losses: by a layer's prefix and by format, what the layer would lose, in nats a token, with
            NVFP4 rounded to nearest.
        experts: of each layer in 8 bits.
    """

    asked: float
    taken: float
    formats: dict[str, str]
    losses: dict[str, dict[str, float]]
    experts: list[BaseReport]


@dataclass(frozen=True)
class RunReport:
    """A whole run.

    Attributes:
        source, target: folders; command: how the run was started.
        layout, scales: names of the layout and of the scale rule; with ``calibration``, ``scales``
            is the rule that it is compared with.
        versions: of this package and of those that decide what it computes.
        bytes_before, bytes_after: sizes of the whole checkpoint.
        layers: one entry for each layer's experts.
        dense: the dense linears, if they were quantized too.
        fingerprint: of the run (``Plan.fingerprint``).
        of_commit: the same of a commit on the hub (``Plan.fingerprint_of_commit``), or empty.
        files: relative paths of all files that the run wrote; another run may replace them.
        digests: SHA-256, in hexadecimal, of those that people edit: what was copied, and
            ``config.json``. What was edited since is never deleted.
        activations: ``nvfp4`` if the checkpoint says that activations are quantized too; ``bf16``
            if only weights are.
        input_scales: how the input scales were found; None if there are none, or all are 1.0.
        base: the linears in 8 bits, if there are any.
        bits: the formats of the layers' experts, if not all are NVFP4 by choice of a budget.
        kv_cache: ``fp8`` if the config asks for keys and values in FP8; or another kind of
            ``quantize.checkpoint.kv_cache``, which the source has.
        kv_scales: by attention, the scales of its keys and then of its values, if calibration has
            found any or the source has some.
        converted: some weights were NVFP4 in the source, and keep their bits and input scales. Of
            them nothing was lost.
        revision: the source's commit on the hub (``quantize.checkpoint.hub.revision_of``); None if
            that is not known.
        source_digest: SHA-256, in hexadecimal, of a part of each tensor of the source and of all
            files beside (``quantize.checkpoint.identity``).
        weight_only: patterns of module paths of experts whose activations stay floats, though the
            checkpoint says that activations are quantized.
        sessions: when, how long and where the run was made; empty if it is to be reproducible
            (``quantize.run.sessions``).
    """

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
    fingerprint: str = ""
    of_commit: str = ""
    files: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    activations: str = "bf16"
    input_scales: CalibrationReport | None = None
    base: BaseReport | None = None
    bits: BitsReport | None = None
    kv_cache: str | None = None
    kv_scales: dict[str, list[float]] = field(default_factory=dict)
    converted: bool = False
    revision: str | None = None
    source_digest: str = ""
    weight_only: list[str] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)


_LATER: dict[str, Any] = {
    "of_commit": "",
    "files": [],
    "digests": {},
    "base": None,
    "bits": None,
    "kv_cache": None,
    "kv_scales": {},
    "converted": False,
    "revision": None,
    "source_digest": "",
    "weight_only": [],
    "sessions": [],
}
"""What older reports do not have."""


def dumps(run: RunReport) -> str:
    """``run`` as JSON: ASCII, one line, the same for equal runs."""
    value = {"version": VERSION} | _without_nan(asdict(run))
    return json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n"


def loads(text: str | bytes) -> RunReport:
    """The run that :func:`dumps` made ``text`` of.

    Raises:
        QuantizeError: if ``text`` is not JSON, has another version, or is no report.
    """
    try:
        value = json.loads(text)
        if value["version"] != VERSION:
            raise QuantizeError(
                f"the report has version {value['version']!r} and this package reads {VERSION}; "
                "read it with the package that wrote it"
            )
        parts = _fields(RunReport, _LATER | value)
        parts["layers"] = [_layer(layer) for layer in parts["layers"]]
        parts["dense"] = _layer(parts["dense"]) if parts["dense"] else None
        for name in ("calibration", "input_scales"):
            if parts[name]:
                # Older reports have neither.
                values = {"input_scale_rule": "max", "digest": ""} | parts[name]
                parts[name] = CalibrationReport(**_fields(CalibrationReport, values))
        if parts["base"]:
            parts["base"] = _base(parts["base"])
        if parts["bits"]:
            bits = _fields(BitsReport, parts["bits"])
            parts["bits"] = BitsReport(**bits | {"experts": [_base(x) for x in bits["experts"]]})
        parts["sessions"] = [_session(one) for one in parts["sessions"]]
        run = RunReport(**parts)
        if not _fits(run, RunReport) or any(len(x.scale_counts) != 127 for x in run.layers):
            raise TypeError("a value of another type")
        return run
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise QuantizeError(f"not a report of nvfp4-moe ({error!r})") from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value, and all that it holds, is of the type that a class announces."""
    inner = get_args(kind)
    match get_origin(kind):
        case types.UnionType:
            return any(_fits(value, one) for one in inner)
        case origin if origin in (list, tuple):
            return isinstance(value, origin) and all(_fits(item, inner[0]) for item in value)
        case origin if origin is dict:
            return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return isinstance(value, kind) and all(  # type: ignore[arg-type]
            _fits(getattr(value, name), hint) for name, hint in hints.items()
        )
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _layer(value: dict[str, Any]) -> LayerReport:
    parts = _fields(LayerReport, value)
    parts["projections"], parts["names"] = tuple(value["projections"]), tuple(value["names"])
    parts["errors"] = [tuple(_floats(errors)) for errors in value["errors"]]
    if parts["calibration"]:
        stats = _fields(ExpertStats, parts["calibration"])
        for name in ("before", "after"):
            stats[name] = [_floats(errors) for errors in stats[name]]
        parts["calibration"] = ExpertStats(**stats)
    return LayerReport(**parts)


def _base(value: dict[str, Any]) -> BaseReport:
    parts = _fields(BaseReport, value)
    return BaseReport(**parts | {"errors": _floats(parts["errors"])})


def _session(value: dict[str, Any]) -> Session:
    machine = Machine(**_fields(Machine, value["machine"]))
    return Session(**_fields(Session, value) | {"machine": machine})


def _fields(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    return {field.name: value[field.name] for field in fields(kind)}


def _floats(errors: list[float | str | None]) -> list[float]:
    return [math.nan if error is None else float(error) for error in errors]


def _without_nan(value: Any) -> Any:
    """``value`` with what JSON has no number for: NaN as ``None``, infinity as a string."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity"
    return value
