"""What a user decides about a run."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

from quantize.experts.gates import Gate
from quantize.experts.parts import names_part, other_part

MIN_TOKENS = 32
"""An expert with fewer tokens is not calibrated, because they say too little: its weights are
rounded to nearest, and its input scales are those of its layer."""

KV_AUTO = "auto"
"""Nothing is said of a key-value cache, whatever the source says."""


@dataclass(frozen=True)
class Calibration:
    """See ``--calibrate``, ``--input-scales`` and the options beside them.

    Attributes:
        text: where the text is from, as the user said it.
        num_samples: how many sequences of tokens there are.
        sequence_length: how many tokens each of them has.
        digest: of the tokens themselves.
        method: a key of ``quantize.nvfp4.rounding.METHODS``; None: only the ranges of experts'
            inputs are gathered, and weights are rounded to nearest.
        every_expert: calibrate each expert with all tokens, not only with those routed to it.
        input_scale_rule: a key of ``quantize.nvfp4.input_scales.INPUT_RULES``.
    """

    text: str
    num_samples: int
    sequence_length: int
    digest: str
    method: str | None = "descent"
    every_expert: bool = False
    input_scale_rule: str = "max"


@dataclass(frozen=True)
class Options:
    """What a user decides about the output.

    Attributes:
        layout: a key of ``quantize.layouts.LAYOUTS``.
        scales: a key of ``quantize.nvfp4.scales.RULES``.
        activations: the checkpoint says that activations are quantized to NVFP4 too, and has input
            scales: those that calibration finds, else 1.0, by which kernels lose small inputs. Of
            weights that are NVFP4 already, it keeps theirs. None: as a source that is all NVFP4 has
            it, and else not.
        weight_only: patterns of module paths of experts whose activations stay floats though those
            of others are quantized: they have no input scales.
        max_shard_size: bytes; a shard exceeds it only if a single tensor does.
        gate: the experts' gate, if the user states it; else it is identified.
        include: patterns of module paths (``fnmatch``); if there are any, only layers' experts and
            linears that match one are quantized. Experts outside of the language model are
            quantized only if one names the part of the model that they are in.
        exclude: patterns of module paths that are not quantized, though included.
        linears: quantize dense linears too (``quantize.experts.linears``).
        base: a key of ``quantize.layouts.base.BASES``: the format of dense linears beside the
            experts; None: they stay.
        bits: a weight of the experts may take so many on average, scales of blocks included; None:
            all are NVFP4.
        formats: module paths of experts that are not NVFP4, though included, each with the name of
            their format (``quantize.run.bits``): what was chosen for ``bits``.
        kv_cache: ``fp8`` if the config asks engines to keep keys and values in FP8; ``KV_AUTO`` if
            it says nothing of them; None: as the source says. In a plan it is decided: a kind of
            ``quantize.checkpoint.kv_cache``, or None for nothing.
        kv_scales: the scales of that cache are found by calibration, and written.
        kv_carried: they are the source's; a plan decides that.
        trust_remote_code: run a checkpoint's own Python code to identify its gate.
        calibration: how experts are calibrated; None: not at all.
    """

    layout: str = "modelopt"
    scales: str = "mse"
    activations: bool | None = None
    weight_only: tuple[str, ...] = ()
    max_shard_size: int = 5 * 10**9
    gate: Gate | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    linears: bool = False
    base: str | None = None
    bits: float | None = None
    formats: tuple[tuple[str, str], ...] = ()
    kv_cache: str | None = None
    kv_scales: bool = False
    kv_carried: bool = False
    trust_remote_code: bool = False
    calibration: Calibration | None = None

    def asks_for(self, module: str, config: dict[str, Any]) -> bool:
        """Whether ``module`` is in another part than the language model and ``include`` asks for
        it.

        A pattern does if it matches the module and names the part.

        Args:
            config: the contents of ``config.json``.
        """
        part = other_part(module, config)
        return part is not None and any(
            names_part(pattern, part) and matches(module, (pattern,)) for pattern in self.include
        )

    def keeps_floats(self, module: str) -> bool:
        """Whether ``weight_only`` says that what goes into experts is not quantized."""
        return matches(module, self.weight_only)

    def takes(self, module: str) -> bool:
        """Whether ``include`` and ``exclude`` leave ``module`` to be quantized, and ``formats`` say
        nothing else of it."""
        wanted = not self.include or matches(module, self.include)
        stays = matches(module, self.exclude) or any(module == prefix for prefix, _ in self.formats)
        return wanted and not stays


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether a module path matches one of ``patterns``, as ``fnmatch`` has it."""
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)
