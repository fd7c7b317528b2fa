"""A checkpoint that is not quantized, served as if it had been: quantized while it loads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.plugin.conftest import Damage
from tests.plugin.reference import dequantize
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
        execute(
            source, plan(source, Options(scales="max", activations=asked)), tmp_path / "offline"
        )
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
        execute(source, plan(source, Options(scales="max")), tmp_path / "offline")
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


def experts_of_llama4(folder: Path) -> list[list[torch.Tensor]]:
    """[gate, up, down] of each expert of layer 1, by Transformers' own modeling code: the stacks
    are ``[experts, in, out]``, gate before up."""
    tensors = load_file(folder / "model.safetensors")
    both, down = (tensors[f"{LLAMA4}.{name}"].double() for name in ("gate_up_proj", "down_proj"))
    return [[*w.T.chunk(2), d.T] for w, d in zip(both, down, strict=True)]


LLAMA4 = "model.layers.1.feed_forward.experts"


@pytest.mark.parametrize("offline", [False, True])
def test_whole_stacks(load: Load, tmp_path: Path, offline: bool) -> None:
    """vLLM's Llama-4 hands over the experts of a layer in one tensor."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=48, intermediate_size_mlp=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1,
        no_rope_layers=[1, 1], layer_types=["full_attention"] * 2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).bfloat16()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    model.save_pretrained(tmp_path / "bf16")
    folder = tmp_path / "bf16"
    if offline:
        folder = tmp_path / "offline"
        with Checkpoint(tmp_path / "bf16") as source:
            execute(source, plan(source), folder)
    layer = load(folder)[LLAMA4].routed_experts
    for expert, matrices in enumerate(experts_of_llama4(tmp_path / "bf16")):
        for got, want in zip(loaded(layer, expert, folded=True), matrices, strict=True):
            assert far_apart(got, want) < 0.12  # any other matrix: 1.4


def loaded(layer: Any, place: int, folded: bool) -> list[torch.Tensor]:
    """[gate, up, down] that a layer holds for an expert; ``folded``: it has been processed."""
    scale = layer.w13_weight_scale_2[place] if folded else layer.w13_weight_scale_2[place, 0]
    both = dequantize(layer.w13_weight[place], layer.w13_weight_scale[place], scale)
    scale = layer.w2_weight_scale_2[place]
    return [*both.chunk(2), dequantize(layer.w2_weight[place], layer.w2_weight_scale[place], scale)]


def far_apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def moe_layer(redundant: int) -> Any:
    """vLLM's layer of 4 experts, and copies as EPLB makes room for, on the fly."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    from quantize.experts.gates import Gate, Gates
    from vllm_nvfp4_moe.config import NvFp4MoEConfig

    quantization: Any = NvFp4MoEConfig()
    quantization.gates = Gates.uniform(Gate("silu"))
    with set_current_vllm_config(VllmConfig(), check_compile=False):
        runner = FusedMoEFactory(
            num_experts=4, top_k=2, hidden_size=64, intermediate_size=48,
            params_dtype=torch.bfloat16, quant_config=quantization, prefix="model.layers.0.experts",
            num_redundant_experts=redundant, enable_eplb=redundant > 0,
        )  # fmt: skip
    return runner.routed_experts


@pytest.mark.parametrize("stacked", [True, False])
def test_redundant_experts(
    load: Load, shallow_bf16: Path, monkeypatch: pytest.MonkeyPatch, stacked: bool
) -> None:
    """EPLB's copies begin as the experts 0, 1, ... Of stacked ones, vLLM's loader loads none."""
    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

    load(shallow_bf16)  # vLLM's groups of ranks are there then
    monkeypatch.setattr(CpuMethod, "supports_eplb", True)  # as that of GPUs
    layer = moe_layer(redundant=6)
    assert layer.global_num_experts == 10
    random = torch.Generator().manual_seed(0)
    both = torch.randn(4, 96, 64, generator=random).bfloat16()
    down = torch.randn(4, 64, 48, generator=random).bfloat16()
    weights = [("gate_up_proj", both), ("down_proj", down)]
    if not stacked:
        weights = [
            (f"{expert}.{name}.weight", tensor)
            for expert in range(4)
            for name, tensor in (
                ("gate_proj", both[expert, :48]),
                ("up_proj", both[expert, 48:]),
                ("down_proj", down[expert]),
            )
        ]
    assert set(layer.load_weights(weights)) == {"w13_weight", "w2_weight"}
    layer.quant_method.loads.complete()
    for place, expert in enumerate([0, 1, 2, 3, 0, 1, 2, 3, 0, 1]):
        wanted = (*both[expert].chunk(2), down[expert])
        for got, want in zip(loaded(layer, place, folded=False), wanted, strict=True):
            assert far_apart(got, want) < 0.12, place


def test_more_experts_than_the_model_has(load: Load, shallow_bf16: Path) -> None:
    load(shallow_bf16)
    layer = moe_layer(redundant=0)
    with pytest.raises(ValueError, match="has an expert 4, the model 4"):
        list(layer.load_weights([("gate_up_proj", torch.zeros(6, 96, 64))]))
    loader = layer.w2_weight.weight_loader
    with pytest.raises(ValueError, match="has 6 experts in one tensor, not 4"):
        loader(layer.w2_weight, torch.zeros(6, 64, 48), "w2_weight", "w2", 0)
