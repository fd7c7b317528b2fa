"""Checkpoints of ``--weight-only``: stock vLLM's classes and ours say the same of each layer.

vLLM has no kernels for NVFP4 experts on CPUs, so of its own methods none is looked for here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantize.layouts import LAYOUTS
from tests.quantize import checkpoints
from vllm_nvfp4_moe.method import NvFp4MoEMethod

Load = Callable[..., dict[str, Any]]
LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
each = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Layer 1 keeps its inputs."""
    folder = tmp_path_factory.mktemp("weight_only")
    checkpoints.build("qwen3_moe").save_pretrained(folder / "source")
    for layout in LAYOUTS:
        checkpoints.convert(
            folder / "source", folder / layout, layout, activations=True, weight_only=(LAYERS[1],)
        )
    return {layout: folder / layout for layout in LAYOUTS}


@each
def test_ours(load: Load, made: dict[str, Path], layout: str) -> None:
    runners = load(made[layout])
    methods = [runners[layer].routed_experts.quant_method for layer in LAYERS]
    assert all(isinstance(method, NvFp4MoEMethod) for method in methods)
    assert [method.weight_only for method in methods] == [False, True]


@each
def test_stock_vllm(
    load: Load, made: dict[str, Path], layout: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Its own classes, through its own loader: the layer's experts are for weight-only kernels, and
    have no input scales."""
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as ct,
    )

    chosen: list[Any] = []

    def none(*_: Any, **key: Any) -> tuple[Any, Any]:
        chosen.append(key["activation_key"])
        return SimpleNamespace(value="none"), None

    for module, method in (
        (modelopt, modelopt.ModelOptNvFp4FusedMoE),
        (ct, ct.CompressedTensorsW4A4Nvfp4MoEMethod),
    ):
        monkeypatch.setattr(module, "select_nvfp4_moe_backend", none)
        monkeypatch.setattr(method, "process_weights_after_loading", lambda self, layer: None)
    stock = Path(shutil.copytree(made[layout], tmp_path / "stock"))
    config = json.loads((stock / "config.json").read_text())
    del config["nvfp4_moe"]
    (stock / "config.json").write_text(json.dumps(config))
    runners = load(stock, None)
    methods = [runners[layer].routed_experts.quant_method for layer in LAYERS]
    assert not any(isinstance(method, NvFp4MoEMethod) for method in methods)
    assert [method.use_a16 for method in methods] == [False, True]
    assert [key is None for key in chosen] == [False, True]
