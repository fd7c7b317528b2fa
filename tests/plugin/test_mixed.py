"""ModelOpt's mixed layout: the experts are ours, the rest is vLLM's, each as it is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.plugin import mixed
from tests.plugin.reference import experts_of, routed
from tests.plugin.test_layer import relative, routing

LAYER = "model.layers.1.mlp.experts"
Load = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("map_in_config", [False, True])
@pytest.mark.usefixtures("mxfp8_on_cpus")
def test_each_as_it_is_stored(
    load: Load, shallow: dict[str, Path], tmp_path: Path, map_in_config: bool
) -> None:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.modelopt import ModelOptLinearMethod

    from vllm_nvfp4_moe.method import NvFp4MoEMethod

    folder = mixed.write(shallow["modelopt"], tmp_path / "mixed", map_in_config)
    runners = load(folder)
    layer = runners[LAYER].routed_experts
    assert isinstance(layer.quant_method, NvFp4MoEMethod)
    torch.manual_seed(0)
    x = torch.randn(9, 384).bfloat16()
    weights, ids = routing(9)
    out = layer.quant_method.apply(layer, x, weights, ids, None, None)
    truth = routed(x, experts_of(shallow["modelopt"], LAYER, "modelopt", 32), weights, ids)
    assert relative(out, truth) < 6e-3

    modules = dict(runners["model"].named_modules())
    linear = {n: m for n, m in modules.items() if isinstance(m, LinearBase)}
    kinds = {n: isinstance(m.quant_method, ModelOptLinearMethod) for n, m in linear.items()}
    assert any(name.endswith("o_proj") for name in kinds)
    for name, is_mxfp8 in kinds.items():
        assert is_mxfp8 == name.endswith("_proj"), name
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj"
    weight = mixed.decode_mxfp8(stored[f"{name}.weight"], stored[f"{name}.weight_scale"])
    found = next(m for n, m in linear.items() if n.endswith("layers.0.self_attn.o_proj"))
    y = torch.randn(5, weight.shape[1]).bfloat16()
    result = found(y)
    result = result[0] if isinstance(result, tuple) else result
    # MXFP8 kernels round activations to E4M3 too: half a step of 2 ** -3, and less on average.
    assert relative(result, y.double() @ weight.T) < 0.04


def test_a_mix_without_its_map(load: Load, shallow: dict[str, Path], tmp_path: Path) -> None:
    folder = mixed.write(shallow["modelopt"], tmp_path / "mixed")
    file = folder / "hf_quant_config.json"
    whole = json.loads(file.read_text())
    del whole["quantization"]["quantized_layers"]
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"MIXED_PRECISION, and neither config\.json nor hf_quant"):
        load(folder)


def test_a_mix_without_nvfp4(load: Load, shallow: dict[str, Path], tmp_path: Path) -> None:
    folder = mixed.write(shallow["modelopt"], tmp_path / "mixed", map_in_config=True)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for entry in config["quantization_config"]["quantized_layers"].values():
        entry["quant_algo"] = "FP8"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quant_method is 'modelopt'"):
        load(folder)
