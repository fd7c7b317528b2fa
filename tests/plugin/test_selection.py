"""Checkpoints of which only a part is quantized: vLLM takes each module as it lies in the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.plugin import others

LAYOUTS = ("modelopt", "compressed-tensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_that_is_left_out_runs_as_it_was(
    load: Callable[..., dict[str, Any]], tmp_path: Path, layout: str
) -> None:
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

    from vllm_nvfp4_moe.method import NvFp4MoEMethod

    plain = others.plain(tmp_path / "bf16")
    others.quantized(plain, tmp_path / "out", layout=layout, exclude=("*.layers.0.*",))
    layers = load(tmp_path / "out")
    left, taken = (layers[f"model.layers.{i}.mlp.experts"].routed_experts for i in (0, 1))
    assert isinstance(left.quant_method, UnquantizedFusedMoEMethod)
    assert isinstance(taken.quant_method, NvFp4MoEMethod)
    weights = load_file(plain / "model.safetensors")
    for kinds, parameter in (
        (("gate_proj", "up_proj"), left.w13_weight),
        (("down_proj",), left.w2_weight),
    ):
        names = [f"{others.LAYERS[0]}.{e}.{kind}.weight" for e in range(4) for kind in kinds]
        want = torch.cat([weights[name].float().flatten() for name in names])
        # In another order, the CPU kernel's; a row may be padded by zeros.
        found = parameter.float().flatten()
        assert torch.equal(found[found != 0].sort()[0], want[want != 0].sort()[0])
