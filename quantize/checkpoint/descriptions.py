"""What configs say of how weights are quantized, wherever they say it.

The weights that are written have a description of their own. One of the source's that remains
beside it, at any depth, is wrong, and a reader may believe it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantize.checkpoint.tensors import PLAIN, TensorInfo

_WHOLE = ("quantization_config", "compression_config", "quant_config", "quantize_config")
"""Keys whose value describes quantized weights, whatever it is."""

_FIELDS = (*_WHOLE, "expert_dtype", "weight_block_size", "quant_method", "quant_algo")
"""Keys that say nothing of a model whose weights are floats."""

_SIGNS = {"bits", "group_size", "quant_method", "quant_algo", "fmt", "qformat_weight"}
"""Keys that ``quantization`` has if it describes weights (MLX, Mistral, ModelOpt). Codecs have
something else of that name."""

_QUANTIZED_DTYPE = re.compile(r"(?:torch\.)?(?:float8|float4|fp8|fp4|u?int[1248]\b).*")

_COMPANIONS = re.compile(
    r".*\.(?:weight_scale\w*|weight_packed|qweight|qzeros|scales|absmax|quant_map|quant_state\.\w+"
    r"|SCB|weight_shape)"
)
"""Names of tensors that only quantized weights have beside them."""


def descriptions(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every description of quantized weights in ``config``: its path and value, outer ones first.

    Args:
        config: the contents of ``config.json``.
    """
    if isinstance(config, dict):
        for key in config:
            whole = key in _WHOLE and config[key] is not None
            if whole or _is_quantization(key, config[key]):
                yield f"{path}{key}", config[key]
        for key, value in config.items():
            if key not in _WHOLE and not _is_quantization(key, value):
                yield from descriptions(value, f"{path}{key}.")
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from descriptions(value, f"{path.removesuffix('.')}[{index}].")


def without_descriptions(value: Any) -> Any:
    """A copy of ``value``, the contents of a JSON file, that describes weights which are floats.

    Descriptions of quantized weights are left out at every depth. A ``dtype`` of such weights
    becomes ``bfloat16``, in which dequantized weights are written.
    """
    if isinstance(value, list):
        return [without_descriptions(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if key in _FIELDS or _is_quantization(key, item):
            continue
        quantized = isinstance(item, str) and _QUANTIZED_DTYPE.fullmatch(item)
        is_dtype = key in ("dtype", "torch_dtype")
        kept[key] = "bfloat16" if is_dtype and quantized else without_descriptions(item)
    return kept


def are_plain(stored: Mapping[str, TensorInfo]) -> bool:
    """Whether no tensor is quantized: then what a config says of quantization is left over.

    Indices and masks are no weights; they may be of 64-bit integers or booleans.
    """
    plain = {*PLAIN, "F64", "I64", "BOOL"}
    return not any(
        _COMPANIONS.fullmatch(name) or (len(info.shape) > 1 and info.dtype not in plain)
        for name, info in stored.items()
    )


def _is_quantization(key: str, value: Any) -> bool:
    return key == "quantization" and isinstance(value, dict) and not _SIGNS.isdisjoint(value)
