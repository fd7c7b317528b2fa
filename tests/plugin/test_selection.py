"""Checkpoints of which only a part is quantized: vLLM takes each module as it lies in the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize import reference

LAYOUTS = ("modelopt", "compressed-tensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_is_left_out_runs_as_it_was(
    load: Callable[..., dict[str, Any]], random_m3: dict[int, Path], layout: str, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

    from vllm_nvfp4_moe.method import NvFp4MoEMethod

    with Checkpoint(random_m3[3]) as source:
        options = Options(layout=layout, exclude=("*.layers.1.*",))
        execute(source, plan(source, options), tmp_path / "out")
    layers = load(tmp_path / "out")
    left, taken = (layers[f"model.layers.{i}.mlp.experts"].routed_experts for i in (1, 2))
    assert isinstance(left.quant_method, UnquantizedFusedMoEMethod)
    assert isinstance(taken.quant_method, NvFp4MoEMethod)
    weights = {name: raw.array() for name, raw in reference.read_folder(random_m3[3]).items()}
    prefix = "model.layers.1.mlp.experts"
    for name, parameter in (("gate_up_proj", left.w13_weight), ("down_proj", left.w2_weight)):
        want = torch.from_numpy(weights[f"{prefix}.{name}"])
        # In another order, the CPU kernel's.
        assert torch.equal(parameter.float().flatten().sort()[0], want.flatten().sort()[0])
