"""What is refused as a source, and why: formats that cannot be, or should not be, read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.checkpoint.sources import FORMATS
from quantize.checkpoint.sources.stored_weight import quantization_config
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError

NVFP4 = "nvfp4"
_NVFP4_SUFFIXES = ("scale_2", "weight_global_scale")

_ORIGINAL = "start from the original one (bfloat16, float16, float32, FP8, MXFP8 or MXFP4)"

_UNQUANTIZED = {"none", "dense"}
"""What configs say where nothing but the KV cache is quantized: ModelOpt's and compressed-tensors'
words."""


def undecodable(stored: Mapping[str, TensorInfo]) -> set[str]:
    """Formats that some tensors are stored in, going by names, and that are not decoded."""
    return {NVFP4} if any(name.endswith(_NVFP4_SUFFIXES) for name in stored) else set()


def check_config(config: dict[str, Any], formats: set[str], where: str) -> None:
    """Refuse a source that is quantized in a way that cannot be, or should not be, read.

    Which modules a config leaves out (``ignore``, ``modules_to_not_convert``) is not looked at:
    each tensor shows by itself what it is stored as.

    Args:
        config: of the source.
        formats: what its tensors are stored in, ``Checkpoint.formats``.
        where: the config's file, for the message.

    Raises:
        QuantizeError: with the reason.
    """
    quantization = quantization_config(config)
    schemes = {scheme.lower() for scheme in _schemes(quantization)} | (formats & {NVFP4})
    if any(NVFP4 in scheme for scheme in schemes):
        raise QuantizeError(
            f"{where}: the checkpoint is already NVFP4; quantizing 4-bit values again only loses "
            f"accuracy; {_ORIGINAL}"
        )
    readable = _UNQUANTIZED.union(*(fmt.config_names for fmt in FORMATS.values()))
    if unreadable := sorted(schemes - readable):
        raise QuantizeError(
            f"{where}: the checkpoint is already quantized ({_method(quantization)}: "
            f"{', '.join(unreadable)}), in a format that cannot be read; {_ORIGINAL}"
        )


def _schemes(quantization: Any) -> set[str]:
    """What a config says weights are stored in, in its own words."""
    if quantization is None:
        return set()
    if not isinstance(quantization, dict):
        return {str(quantization)}
    method = _method(quantization)
    if method.startswith("modelopt"):
        nested = quantization.get("quantization")
        flat = nested if isinstance(nested, dict) else quantization
        layers = flat.get("quantized_layers")
        members = [flat, *(layers.values() if isinstance(layers, dict) else ())]
        algorithms = {str(m.get("quant_algo")) for m in members if isinstance(m, dict)}
        return algorithms - {"MIXED_PRECISION"}
    if method == "compressed-tensors":
        groups = quantization.get("config_groups")
        members = list(groups.values()) if isinstance(groups, dict) else []
        overall = quantization.get("format")
        return {_group_scheme(m, overall) for m in members if isinstance(m, dict)} or {str(overall)}
    if method == "quark":
        layers = quantization.get("layer_quant_config")
        members = [quantization.get("global_quant_config")]
        members += list(layers.values()) if isinstance(layers, dict) else []
        return {_quark_dtype(member) for member in members if isinstance(member, dict)}
    return {method}


def _method(quantization: Any) -> str:
    if not isinstance(quantization, dict):
        return str(quantization)
    fallback = "modelopt" if "quant_algo" in quantization else "unnamed"
    return str(quantization.get("quant_method") or fallback).lower()


def _group_scheme(group: dict[str, Any], overall: Any) -> str:
    """compressed-tensors: a group's format, or the kind of its integers."""
    weights = group.get("weights")
    if isinstance(weights, dict) and weights.get("type") == "int":
        return f"int{weights.get('num_bits')}"
    return str(group.get("format") or overall)


def _quark_dtype(member: dict[str, Any]) -> str:
    weight = member.get("weight")
    weight = weight[0] if isinstance(weight, list) and len(weight) == 1 else weight
    return str(weight.get("dtype") if isinstance(weight, dict) else weight)
