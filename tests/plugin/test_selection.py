"""Checkpoints of which only a part is quantized: vLLM takes each module as it lies in the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize import checkpoints, reference

LAYOUTS = ("modelopt", "compressed-tensors")


@pytest.fixture(scope="module")
def three_layers(m3_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m3-nano's first three layers: one dense, two sparse."""
    from safetensors.torch import load_file

    config = json.loads((m3_nano / "config.json").read_text()) | {"num_hidden_layers": 3}
    for key in ("layer_types", "mlp_layer_types"):
        config[key] = config[key][:3]
    tensors = {
        name: tensor
        for name, tensor in load_file(m3_nano / "model.safetensors").items()
        if not name.startswith("model.layers.") or name[13] <= "2"
    }
    return checkpoints.save(tmp_path_factory.mktemp("three") / "layers", tensors, config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_is_left_out_runs_as_it_was(
    load: Callable[..., dict[str, Any]], three_layers: Path, layout: str, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

    from vllm_nvfp4_moe.method import NvFp4MoEMethod

    with Checkpoint(three_layers) as source:
        options = Options(layout=layout, exclude=("*.layers.1.*",))
        execute(source, plan(source, options), tmp_path / "out")
    layers = load(tmp_path / "out")
    left, taken = (layers[f"model.layers.{i}.mlp.experts"].routed_experts for i in (1, 2))
    assert isinstance(left.quant_method, UnquantizedFusedMoEMethod)
    assert isinstance(taken.quant_method, NvFp4MoEMethod)
    weights = {name: raw.array() for name, raw in reference.read_folder(three_layers).items()}
    prefix = "model.layers.1.mlp.experts"
    for name, parameter in (("gate_up_proj", left.w13_weight), ("down_proj", left.w2_weight)):
        want = torch.from_numpy(weights[f"{prefix}.{name}"])
        # In another order, the CPU kernel's.
        assert torch.equal(parameter.float().flatten().sort()[0], want.flatten().sort()[0])
