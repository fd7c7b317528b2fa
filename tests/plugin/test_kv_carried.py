"""vLLM's own classes read the cache and the scales that a target has from its source."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.model_executor.layers.attention.attention import set_default_quant_scales
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsKVCacheMethod,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

from quantize.layouts import LAYOUTS
from tests.quantize.checkpoints import convert
from tests.quantize.kv_sources import ATTENTION, SCALES, WAYS, Way, save_source
from vllm_nvfp4_moe.config import NvFp4MoEConfig

STOCK = {"modelopt": "modelopt_fp4", "compressed-tensors": "compressed-tensors"}


def config_of(folder: Path) -> dict[str, Any]:
    stored = json.loads((folder / "config.json").read_text())
    return dict(stored["quantization_config"])


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(
    ("way", "layout"),
    [
        ("modelopt", "modelopt"),
        ("compressed-tensors", "modelopt"),
        ("modelopt", "compressed-tensors"),
        ("compressed-tensors", "compressed-tensors"),
        ("quark FP8", "modelopt"),
        ("INT4", "compressed-tensors"),
    ],
)
def test_vllm_reads_the_scales(way: str, layout: str, ours: bool, tmp_path: Path) -> None:
    """By the names that its mapper makes, into the method that its config has for attention."""
    source = save_source(tmp_path / "source", WAYS[way])
    convert(source, tmp_path / "out", layout=layout)
    stored = config_of(tmp_path / "out")
    kind: Any = NvFp4MoEConfig if ours else get_quantization_config(STOCK[layout])
    config = kind.from_config(stored)
    if layout == "modelopt":
        method: BaseKVCacheMethod = config.KVCacheMethodCls(config)
        asked = SimpleNamespace(hf_config=SimpleNamespace(quantization_config=stored))
        assert resolve_kv_cache_dtype_string("auto", asked) == "fp8_e4m3"
    else:
        assert config.kv_cache_scheme is not None
        method = CompressedTensorsKVCacheMethod(config)  # which refuses what it cannot serve
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    weights = dict(config.get_cache_scale_mapper().apply(tensors.items()))
    for attention, (key, value) in zip(ATTENTION, SCALES, strict=True):
        layer: Any = torch.nn.Module()
        layer.kv_cache_dtype, layer.num_kv_heads = "fp8_e4m3", 2
        set_default_quant_scales(layer, register_buffer=True)
        method.create_weights(layer)
        for name, parameter in layer.named_parameters():
            if (found := weights.get(f"{attention}.attn.{name}")) is not None:
                load = getattr(parameter, "weight_loader", lambda p, w: p.data.copy_(w))
                load(parameter, found)
        for name in ("_k_scale", "_v_scale"):  # compressed-tensors registers them again
            delattr(layer, name) if layout != "modelopt" else None
        if layout != "modelopt":
            del layer._q_scale
        method.process_weights_after_loading(layer)
        assert (layer._k_scale_float, layer._v_scale_float) == (key, value)


def test_vllm_reads_modelopts_nvfp4_cache(tmp_path: Path) -> None:
    way = Way("modelopt", {"kv_cache_quant_algo": "NVFP4"})
    convert(save_source(tmp_path / "source", way), tmp_path / "out")
    model = SimpleNamespace(
        hf_config=SimpleNamespace(quantization_config=config_of(tmp_path / "out"))
    )
    assert resolve_kv_cache_dtype_string("auto", model) == "nvfp4"


def test_a_scale_for_each_head_is_one_that_vllm_serves() -> None:
    scheme = LAYOUTS["compressed-tensors"].kv_caches["fp8-head"]
    CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(scheme | {"symmetric": True})
    with pytest.raises(NotImplementedError):
        CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(
            scheme | {"symmetric": True, "type": "int"}
        )
