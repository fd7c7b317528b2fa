"""How a checkpoint says how it was made, so that ``verify`` can make it again and compare.

``config.json`` has it beside the gate, under ``nvfp4_moe``; other readers ignore it::

    {"nvfp4_moe": {"version": 1, "gate": {...},
                   "made": {"version": "0.1.0", "arithmetic": 1, "layout": "modelopt",
                            "scales": "max", "activations": false, "rounding": null,
                            "text": false, "include": [], "exclude": [], "linears": false,
                   "base": null, "bits": null, "formats": {}, "kv_cache": null, "kv_scales": false,
                   "converted": false, "kv_carried": false, "weight_only": [],
                   "revision": "ORG/NAME@COMMIT"}}}
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from quantize.errors import QuantizeError
from quantize.experts.gates import KEY
from quantize.run.options import Options
from quantize.run.version import package_version

FIELD = "made"

ARITHMETIC = 2
"""Counts up when the same weights and the same scale rule give other bits
(``tests/quantize/test_verify_bounds.py`` has digests of some)."""


@dataclass(frozen=True)
class Made:
    """How a checkpoint was made.

    Attributes:
        version: of this package.
        arithmetic: see ``ARITHMETIC``.
        layout, scales, activations, include, exclude, linears, base, bits, formats, kv_cache,
            kv_scales, kv_carried, weight_only: as in ``Options``, decided.
        rounding: a key of ``quantize.nvfp4.rounding.METHODS``; None if experts were rounded to
            nearest, without calibration.
        converted: some weights were NVFP4 in the source, and keep their bits and input scales.
        revision: the source's commit on the hub (``quantize.checkpoint.hub.revision_of``); None if
            it is not known.
        text: other input scales are those of a text; else all are 1.0, where there are any.
    """

    version: str
    arithmetic: int
    layout: str
    scales: str
    activations: bool
    rounding: str | None
    text: bool
    include: list[str]
    exclude: list[str]
    linears: bool
    base: str | None = None
    bits: float | None = None
    formats: dict[str, str] = field(default_factory=dict)
    kv_cache: str | None = None
    kv_scales: bool = False
    converted: bool = False
    kv_carried: bool = False
    weight_only: list[str] = field(default_factory=list)
    revision: str | None = None

    def selection(self) -> Options:
        """What was chosen to be quantized, as options."""
        return Options(
            include=tuple(self.include),
            exclude=tuple(self.exclude),
            linears=self.linears,
            base=self.base,
            bits=self.bits,
            formats=tuple(self.formats.items()),
            weight_only=tuple(self.weight_only),
        )


def record_of(
    options: Options, converted: bool = False, revision: str | None = None
) -> dict[str, Any]:
    """The value of ``made`` for a run with these options.

    Args:
        converted, revision: as in ``Made``.
    """
    calibration = options.calibration
    return asdict(
        Made(
            package_version(),
            ARITHMETIC,
            options.layout,
            options.scales,
            bool(options.activations),
            calibration.method if calibration else None,
            bool(options.activations) and calibration is not None,
            list(options.include),
            list(options.exclude),
            options.linears,
            options.base,
            options.bits,
            dict(options.formats),
            options.kv_cache,
            options.kv_scales,
            converted,
            options.kv_carried,
            list(options.weight_only),
            revision,
        )
    )


def made(config: dict[str, Any], where: str) -> Made | None:
    """How the checkpoint with this ``config.json`` says that it was made; None if it does not.

    Args:
        where: the file, for messages.

    Raises:
        QuantizeError: if what it says cannot be read.
    """
    contract = config.get(KEY)
    if not isinstance(contract, dict) or FIELD not in contract:
        return None
    value = contract[FIELD]
    kinds = {
        "str": str, "int": int, "bool": bool, "list[str]": list, "str | None": str | None,
        "float | None": float | None, "dict[str, str]": dict,
    }  # fmt: skip
    problem = f"{where}: {KEY}.{FIELD} cannot be read"
    if isinstance(value, dict):  # an earlier version did not write what has a default
        value = {"formats": {}, "weight_only": []} | value
        value = {f.name: f.default for f in fields(Made) if f.default is not MISSING} | value
    if not isinstance(value, dict) or set(value) != {one.name for one in fields(Made)}:
        raise QuantizeError(f"{problem}: its fields are not those of this version; update it")
    for one in fields(Made):
        found = value[one.name]
        kind = kinds[str(one.type)]
        items = found.values() if isinstance(found, dict) else found
        strings = not isinstance(found, list | dict) or all(isinstance(i, str) for i in items)
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is int) or not strings:
            raise QuantizeError(f"{problem}: {one.name} is {found!r}; quantize again")
    return Made(**value)
