"""Sources whose key-value cache is described and has scales, as each tool writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from tests.quantize.checkpoints import EXPERTS, HIDDEN, build, per_expert, save
from tests.quantize.nvfp4_sources import INTER, QUANTIZATION, Source

ATTENTION = [f"model.layers.{layer}.self_attn" for layer in range(2)]
SCALES = [(0.02734375, 0.041015625), (0.5625, 0.0031280517578125)]
"""Of keys and of values, by layer: numbers that bfloat16 has."""
HEADS = [(0.25, 0.5), (0.125, 1.0)]

MODELOPT = {"dynamic": False, "num_bits": 8, "type": "float"}
ARGS = {
    "num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "strategy": "tensor",
    "block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax",
    "observer_kwargs": {},
}  # fmt: skip
"""As llm-compressor writes it."""

QUARK_CACHE = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
QUARK = {
    "quant_method": "quark",
    "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
    "layer_quant_config": {
        f"*{letter}_proj": {
            "weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
            "output_tensors": QUARK_CACHE,
        }
        for letter in "kv"
    },
    "export": {"kv_cache_group": ["*k_proj", "*v_proj"]},
}


class Way(NamedTuple):
    """How a tool says it.

    Attributes:
        weights: how experts are stored.
        config: what it adds to ``quantization_config``.
        older: ``hf_quant_config.json``, if there is one.
        names: of the scales below an attention; one: of both.
        dtype, shape: of a scale.
    """

    weights: str
    config: Mapping[str, Any] = MappingProxyType({})
    older: dict[str, Any] | None = None
    names: tuple[str, ...] = ("k_proj.k_scale", "v_proj.v_scale")
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()


DIRECT = ("k_scale", "v_scale")
OLDER = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": "FP8"}}
WAYS = {
    "modelopt": Way("modelopt", {"kv_cache_scheme": MODELOPT}),
    "modelopt in words": Way("modelopt", {"kv_cache_quant_algo": "FP8"}),
    "modelopt beside": Way("modelopt", older=OLDER),
    "compressed-tensors": Way(
        "compressed-tensors", {"kv_cache_scheme": ARGS}, None, DIRECT, torch.bfloat16, (1,)
    ),
    "modelopt FP8": Way("fp8", {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}),
    "quark FP8": Way("fp8", QUARK, None, ("k_proj.output_scale", "v_proj.output_scale")),
    "INT4": Way("int4", {"kv_cache_scheme": ARGS}, None, DIRECT, torch.bfloat16, (1,)),
    "only the cache": Way(
        "bf16", {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    ),
}
"""All say FP8 with one scale for keys and one for values."""


def save_source(folder: Path, way: Way, heads: bool = False, scales: bool = True) -> Path:
    """A Qwen3-MoE in ``folder``, which is returned.

    Args:
        heads: each scale is one for each of two heads.
        scales: there are any.
    """
    made = Source()
    experts, quantization = _experts(way.weights, made)
    cache = {}
    for attention, pair in zip(ATTENTION, SCALES, strict=True) if scales else ():
        for name, scale, per_head in zip(way.names, pair, HEADS, strict=False):
            value = torch.tensor(scale).reshape(way.shape)
            if heads:
                value = torch.tensor(per_head).reshape(2, 1, 1) * scale
            cache[f"{attention}.{name}"] = value.to(way.dtype)
    config = made.config | {"quantization_config": quantization | dict(way.config)}
    save(folder, made.plain | experts | cache, config)
    if way.older is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(way.older))
    return folder


def _experts(weights: str, made: Source) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a model's experts, and what describes them."""
    if weights in QUANTIZATION:
        every = made.tensors(weights)
        return {n: t for n, t in every.items() if n not in made.plain}, QUANTIZATION[weights]
    state = per_expert(build("qwen3_moe", moe_intermediate_size=INTER).state_dict())
    plain = {n: t for n, t in state.items() if ".experts." in n}
    assert len(plain) == 2 * 3 * EXPERTS
    assert all(HIDDEN in t.shape for t in plain.values())
    if weights == "bf16":
        return {n: t.bfloat16() for n, t in plain.items()}, {}
    if weights == "fp8":
        stored = {n: (t * 100).to(torch.float8_e4m3fn) for n, t in plain.items()}
        scales = {f"{n}_scale": torch.tensor(0.01) for n in plain}
        return stored | scales, {"quant_method": "modelopt"}
    codes, generator = {}, torch.Generator().manual_seed(1)
    for name, weight in plain.items():
        rows, columns = weight.shape
        bits = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator)
        codes[f"{name}_packed"] = bits.int()
        codes[f"{name}_scale"] = torch.full((rows, columns // 16), 0.01).bfloat16()
        codes[f"{name}_shape"] = torch.tensor([rows, columns])
    args = {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True,
    }  # fmt: skip
    group = {"weights": args, "targets": ["Linear"], "format": "pack-quantized"}
    return codes, {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }
