"""Refusing source checkpoints in quantized formats that cannot, or should not, be read."""

from __future__ import annotations

from typing import Any

from quantize.checkpoint.descriptions import descriptions
from quantize.checkpoint.sources import FORMATS
from quantize.errors import QuantizeError

_ORIGINAL = (
    "start from the original one (bfloat16, float16, float32, FP8, MXFP8, MXFP4, packed INT4), or "
    "from plain NVFP4"
)

_UNQUANTIZED = {"none", "dense"}
"""What ModelOpt (``none``) and compressed-tensors (``dense``) write into a config when only the KV
cache is quantized."""


def check_config(config: dict[str, Any], where: str) -> None:
    """Raise if a source is quantized in a format that cannot, or should not, be read.

    The config's list of modules that are not quantized (``ignore``, ``modules_to_not_convert``) is
    not used: each tensor itself shows the format that it is stored in.

    Args:
        config: the contents of the source's ``config.json``.
        where: the path of the config, for the message.

    Raises:
        QuantizeError: if the source is refused; the message says why.
    """
    described = [value for _, value in descriptions(config)]
    schemes = {scheme.lower() for value in described for scheme in _schemes(value)}
    readable = _UNQUANTIZED.union(*(fmt.config_names for fmt in FORMATS.values()))
    if unreadable := sorted(schemes - readable):
        methods = ", ".join(dict.fromkeys(map(_method, described)))
        raise QuantizeError(
            f"{where}: the checkpoint is already quantized ({methods}: {', '.join(unreadable)}), "
            f"in a format that cannot be read; {_ORIGINAL}"
        )


def _schemes(quantization: Any) -> set[str]:
    """The formats of weights that a config names, in the words of the tool that wrote it."""
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
    """The format of one of compressed-tensors' config groups, for integers with their bits."""
    weights = group.get("weights")
    form = str(group.get("format") or overall)
    if isinstance(weights, dict) and weights.get("type") == "int":
        return f"int{weights.get('num_bits')} ({form})"
    return form


def _quark_dtype(member: dict[str, Any]) -> str:
    weight = member.get("weight")
    weight = weight[0] if isinstance(weight, list) and len(weight) == 1 else weight
    return str(weight.get("dtype") if isinstance(weight, dict) else weight)
