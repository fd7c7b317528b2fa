"""The sizes and the gate of a checkpoint's experts, from its config and its headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.checkpoint.hub import folder_of
from quantize.checkpoint.language import language_config
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY, Gates, from_contract
from quantize.experts.identify import identify
from quantize.experts.stated import number_of_layers, stated
from vllm_nvfp4_moe.doctor.shape import Shape
from vllm_nvfp4_moe.loading.stored import Stored

_ROUTER_BIAS = re.compile(r"(?:e_score_correction_bias|expert_bias)$")
_BIAS = re.compile(r"\.experts\..*bias$")


def find(source: str, emit: Callable[[dict[str, Any]], None]) -> None:
    """:func:`shape_of`, for a process of its own: ``shape``, and ``gates`` if layers differ; or
    ``error``."""
    try:
        shape, gates = shape_of(source)
    except QuantizeError as error:
        emit({"error": str(error)})
        return
    emit({"shape": asdict(shape), "gates": str(gates) if gates.layers else None})


def shape_of(source: str) -> tuple[Shape, Gates]:
    """The layer's sizes on one rank, named for the checkpoint; and all layers' gates, of which the
    shape has the most frequent one.

    Args:
        source: a folder or a hub id, of which nothing but config and headers are read.

    Raises:
        QuantizeError: if the config does not state the sizes, or the gate is unknown.
    """
    from transformers import PreTrainedConfig

    source = str(folder_of(source) or source)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise QuantizeError(f"{source}: its config.json cannot be read: {why}") from error
    where = f"{source}/config.json"
    contract = raw.get(KEY)
    config = language_config(raw)
    try:
        gates = identify(source) if contract is None else from_contract(contract, where)
    except QuantizeError as error:
        if stated(config, "model.layers.0.mlp.experts").num_experts:
            raise
        raise QuantizeError(
            f"{where}: it states no routed experts; leave the checkpoint out to try MiniMax-M3's"
        ) from error
    gates = gates.concatenated()
    # Sizes may differ from layer to layer, and the first ones may be dense.
    last = max(gates.of_class or [(number_of_layers(config) or 1) - 1])
    said = stated(config, f"model.layers.{last}.mlp.experts")
    sizes = {
        name: _first(values)
        for name, values in (
            ("experts", said.num_experts),
            ("hidden", said.hidden),
            ("intermediate", said.intermediate),
            ("top_k", said.per_token),
        )
    }
    lacking = [name for name, value in sizes.items() if value is None]
    if lacking:
        raise QuantizeError(
            f"{where}: it does not state {', '.join(lacking)} of its routed experts, so no layer "
            "like its own can be made; leave the checkpoint out to try MiniMax-M3's"
        )
    names = Stored(source).names or ()
    sigmoid = config.get("scoring_func") == "sigmoid" or any(map(_ROUTER_BIAS.search, names))
    shape = Shape(
        Path(source).name,
        **sizes,  # type: ignore[arg-type]
        gate=gates.default,
        biased=any(_BIAS.search(n) and not _ROUTER_BIAS.search(n) for n in names),
        router="sigmoid" if sigmoid else "softmax",
    )
    return shape, gates


def _first(values: Mapping[str, Any]) -> int | None:
    """What the first key says."""
    found = next(iter(values.values()), ())
    return found[0] if found else None
