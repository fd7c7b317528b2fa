"""A checkpoint that is not quantized, served as if it had been: quantized while it loads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.plugin.conftest import Damage
from tests.quantize import checkpoints

LAYER = "model.layers.1.mlp.experts"
FUSED = f"{LAYER}.gate_up_proj"
Load = Callable[..., dict[str, Any]]


def parameters(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.data.clone().view(torch.uint8) for name, p in layer.named_parameters()}


@pytest.mark.parametrize("activations", ["bf16", "nvfp4"])
def test_the_weights_are_those_of_the_offline_export(
    load: Load,
    shallow_bf16: Path,
    tmp_path: Path,
    activations: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Experts that come fused, gate over up, through vLLM's Transformers backend."""
    asked = activations == "nvfp4"
    with Checkpoint(shallow_bf16) as source:
        execute(source, plan(source, Options(activations=asked)), tmp_path / "offline")
    offline = load(tmp_path / "offline")[LAYER].routed_experts
    monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", activations)
    logging.getLogger("vllm").propagate = True
    runners = load(shallow_bf16)
    layer = runners[LAYER].routed_experts
    want, got = parameters(offline), parameters(layer)
    assert want.keys() == got.keys()
    assert any("input_scale" in name for name in got) is asked
    assert ("input scales are 1.0" in caplog.text) is asked
    for name in want:
        assert torch.equal(got[name], want[name]), name
    # Without a contract: from the model's class, where vLLM's Transformers backend assumes SiLU.
    assert str(layer.quant_method.gate) == str(offline.quant_method.gate)
    assert layer.activation.value == "swigluoai_uninterleave"

    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    linear = [m for m in runners["model"].modules() if isinstance(m, LinearBase)]
    assert linear
    assert all(isinstance(m.quant_method, UnquantizedLinearMethod) for m in linear)


def test_one_tensor_an_expert(load: Load, tmp_path: Path) -> None:
    """As most checkpoints have them, through a model class of vLLM's own."""
    checkpoints.build("qwen3_moe").save_pretrained(tmp_path / "bf16")
    with Checkpoint(tmp_path / "bf16") as source:
        assert f"{LAYER}.0.gate_proj.weight" in source.tensors
        execute(source, plan(source), tmp_path / "offline")
    want, got = (
        {name: parameters(runner.routed_experts) for name, runner in load(folder).items()
         if name != "model"}
        for folder in (tmp_path / "offline", tmp_path / "bf16")
    )  # fmt: skip
    assert want.keys() == got.keys()
    assert len(want) == 2
    for layer, tensors in want.items():
        for name, tensor in tensors.items():
            assert torch.equal(got[layer][name], tensor), (layer, name)


def test_a_weight_that_is_not_finite(load: Load, shallow_bf16: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FUSED][5, -1, 7] = float("nan")

    folder = Damage(shallow_bf16, tmp_path / "nan").tensors(spoil)
    with pytest.raises(ValueError, match=rf"{LAYER}: expert 5, up \(w3\), weight: .* NaN or inf"):
        load(folder)


def test_weights_that_are_not_floats(load: Load, shallow_bf16: Path, tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FUSED] = tensors[FUSED].to(torch.float8_e4m3fn)

    folder = Damage(shallow_bf16, tmp_path / "fp8").tensors(halve)
    with pytest.raises(ValueError, match=r"expert 0, gate .*float8_e4m3fn, but the checkpoint's"):
        load(folder)


def test_a_projection_that_is_missing(load: Load, shallow_bf16: Path, tmp_path: Path) -> None:
    folder = Damage(shallow_bf16, tmp_path / "short").tensors(lambda t: t.pop(FUSED))
    with pytest.raises(ValueError, match=r"missing .*expert 0, gate \(w1\), weight;.* 61 more"):
        load(folder)


def test_a_model_without_experts(load: Load, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot establish which gate"):
        load(tmp_path)
