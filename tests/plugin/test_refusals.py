"""Each checkpoint that would not give the model's text, damaged in just that way, is refused."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

LAYER = "model.layers.1.mlp.experts"
LAYOUTS = ("modelopt", "compressed-tensors")
CODES = {"modelopt": "weight", "compressed-tensors": "weight_packed"}
GLOBAL = {"modelopt": "weight_scale_2", "compressed-tensors": "weight_global_scale"}
INPUT = {"modelopt": "input_scale", "compressed-tensors": "input_global_scale"}


@pytest.fixture
def four_bit_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that runs here says of itself that it quantizes activations by input scales."""
    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

    monkeypatch.setattr(CpuMethod, "quantizes_activations", property(lambda self: True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["codes", "block", "global", "input"])
@pytest.mark.usefixtures("four_bit_activations")
def test_missing_tensor(load, damage, layout: str, which: str) -> None:
    suffix = {
        "codes": CODES[layout],
        "block": "weight_scale",
        "global": GLOBAL[layout],
        "input": INPUT[layout],
    }[which]
    folder = damage(layout).tensors(lambda t: t.pop(f"{LAYER}.5.up_proj.{suffix}"))
    with pytest.raises(ValueError, match="missing") as caught:
        load(folder)
    assert f"{LAYER}: missing from the checkpoint: expert 5, up (w3), {suffix}" in str(caught.value)
    remedy = "use a --moe-backend that does not, or leave input scales out"
    assert (remedy in str(caught.value)) == (which == "input")


@pytest.mark.parametrize(
    ("layout", "which"),
    [*(("modelopt", which) for which in ("one", "all", "zero")), ("compressed-tensors", "NaN")],
)
def test_input_scales_that_the_kernel_does_not_use(
    load,
    damage,
    shallow: dict[str, Path],
    layout: str,
    which: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Missing or broken ones are said once, and what the layer computes is not affected."""
    from vllm_nvfp4_moe import summary

    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [n for n in tensors if n.endswith(f".{INPUT[layout]}")]
        one = f"{LAYER}.5.up_proj.{INPUT[layout]}"
        for name in names if which == "all" else [one]:
            if which in ("one", "all"):
                del tensors[name]
            else:
                tensors[name].fill_(0.0 if which == "zero" else float("nan"))

    folder = damage(layout).tensors(change)
    warnings: list[str] = []
    monkeypatch.setattr(summary.logger, "warning", lambda text, *args: warnings.append(text % args))
    changed = load(folder)[LAYER].routed_experts
    [said] = warnings
    first = "expert 0, gate (w1)" if which == "all" else "expert 5, up (w3)"
    layers = re.search(r"in (\d+) of (\d+) layers", said)
    assert layers is not None
    assert f"{LAYER}: {first}, {INPUT[layout]}" in said
    assert layers[1] == (layers[2] if which == "all" else "1")
    same = load(shallow[layout])[LAYER].routed_experts
    assert warnings == [said]
    for name, parameter in same.named_parameters():
        if "input_scale" in name:  # no uninitialised memory
            assert (changed.get_parameter(name) == 1).all()
        else:
            assert torch.equal(
                parameter.view(torch.uint8), changed.get_parameter(name).view(torch.uint8)
            )
    x = torch.randn(8, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights, ids = torch.rand(8, 4), torch.arange(32).view(8, 4).int()
    outputs = [
        layer.quant_method.apply(layer, x, weights, ids, None, None) for layer in (changed, same)
    ]
    assert outputs[0].abs().max() > 0
    assert torch.equal(*outputs)


def test_missing_expert_names_the_first_and_counts_the_rest(load, damage) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(f"{LAYER}.31.")]:
            del tensors[name]

    with pytest.raises(ValueError, match=r"expert 31, gate \(w1\), weight;.* and 6 more tensors"):
        load(damage("modelopt").tensors(drop))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("value", "word"),
    [(0.0, "zero"), (float("nan"), "NaN"), (float("inf"), "infinite"), (-1.0, "negative")],
)
def test_bad_global_scale(load, damage, layout: str, value: float, word: str) -> None:
    name = f"{LAYER}.7.down_proj.{GLOBAL[layout]}"
    folder = damage(layout).tensors(lambda t: t[name].fill_(value))
    with pytest.raises(ValueError, match=f"1 of 1 scales are {word}") as caught:
        load(folder)
    assert f"{LAYER}: expert 7, down (w2), {GLOBAL[layout]}" in str(caught.value)


@pytest.mark.parametrize(("bits", "word"), [(0x00, "zero"), (0x7F, "NaN"), (0xB8, "negative")])
def test_bad_block_scale(load, damage, bits: int, word: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.0.gate_proj.weight_scale"].view(torch.uint8)[17, 3] = bits

    with pytest.raises(ValueError, match=f"1 of 3072 scales are {word}") as caught:
        load(damage("modelopt").tensors(change))
    assert f"{LAYER}: expert 0, gate (w1), weight_scale" in str(caught.value)


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.usefixtures("four_bit_activations")
def test_bad_input_scale(load, damage, value: float) -> None:
    name = f"{LAYER}.2.gate_proj.input_scale"
    with pytest.raises(ValueError, match=r"expert 2, gate \(w1\), input_scale: 1 of 1 scales are"):
        load(damage("modelopt").tensors(lambda t: t[name].fill_(value)))


@pytest.mark.parametrize("suffix", ["weight", "weight_scale"])
def test_short_tensor(load, damage, suffix: str) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{LAYER}.4.down_proj.{suffix}"
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(ValueError, match=rf"expert 4, down \(w2\), {suffix}: shape \[383, "):
        load(damage("modelopt").tensors(cut))


def test_wrong_dtype(load, damage) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{LAYER}.4.down_proj.weight_scale"
        tensors[name] = tensors[name].to(torch.bfloat16)

    with pytest.raises(ValueError, match=r"expert 4, down .*dtype torch.bfloat16, expected"):
        load(damage("modelopt").tensors(change))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_differing_global_scales_are_folded(
    load, damage, shallow: dict[str, Path], layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The up projection, written with a four times larger global scale and block scales a quarter
    as large, still means the same weights; vLLM's layer has place for one global scale only."""

    def rescale(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(32):
            base = f"{LAYER}.{expert}.up_proj."
            tensors[base + GLOBAL[layout]] *= 4.0 if layout == "modelopt" else 0.25
            blocks = tensors[base + "weight_scale"]
            tensors[base + "weight_scale"] = (blocks.float() / 4).to(torch.float8_e4m3fn)

    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        changed = load(damage(layout).tensors(rescale))[LAYER].routed_experts
    same = load(shallow[layout])[LAYER].routed_experts
    assert "folded into the block scales" in caplog.text
    assert LAYER in caplog.text

    inner = same.w13_weight.shape[1] // 2
    for side, factor in ((slice(0, inner), 0.25), (slice(inner, None), 1.0)):
        before = same.w13_weight_scale[:, side].float() * same.w13_weight_scale_2[:, None, None]
        after = (
            changed.w13_weight_scale[:, side].float() * changed.w13_weight_scale_2[:, None, None]
        )
        # Up went down to a quarter and stays there; gate is folded by a quarter. Powers of two are
        # exact but for what falls among E4M3's subnormals, half a step of 2 ** -9.
        step = changed.w13_weight_scale_2[:, None, None] * 2.0**-10
        assert torch.all((after - before).abs() <= step), factor


def test_global_scales_too_far_apart_are_refused(load, damage) -> None:
    """Folding a factor of a million into E4M3 would flatten every block scale."""

    def rescale(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.9.up_proj.weight_scale_2"] *= 1e6

    with pytest.raises(ValueError, match=r"expert 9: the global scales .* differ by a factor of"):
        load(damage("modelopt").tensors(rescale))


def test_no_contract_and_unknown_class(load, damage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a contract, the model's class decides; if that fails, nothing is guessed."""
    import quantize.experts.identify

    folder = damage("modelopt").config(lambda c: c.pop("nvfp4_moe"))
    assert load(folder)[LAYER].routed_experts.activation.value == "swigluoai_uninterleave"
    monkeypatch.setattr(quantize.experts.identify, "match", lambda probe: None)
    with pytest.raises(ValueError, match="cannot establish which gate its experts apply"):
        load(folder)


def test_no_contract_and_a_config_class_of_vllms_own(shallow, shallow_hub: Path) -> None:
    """Others' NVFP4 files of a published MiniMax-M3: vLLM's config class says nothing of the gate,
    Transformers' class for the same config.json does."""
    import json

    from vllm.transformers_utils.configs.minimax_m3 import MiniMaxM3Config

    from vllm_nvfp4_moe.config import NvFp4MoEConfig

    stored = json.loads((shallow["modelopt"] / "config.json").read_text())
    config = NvFp4MoEConfig.from_config(stored["quantization_config"])
    theirs = MiniMaxM3Config(text_config={"hidden_size": 384})
    config.maybe_update_config(str(shallow_hub), theirs)
    assert str(config.gates) == "swiglu_oai(alpha=1.702, beta=1, limit=7)"


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"form": "mish"}, "unknown gate form 'mish'"),
        ({"form": "swiglu_oai", "alpha": "big"}, "alpha must be a number"),
        ({"form": "swiglu_oai", "limit": -7.0}, "limit must be positive"),
        ({}, "not a gate contract"),
    ],
)
def test_bad_contract(load, damage, gate: dict, message: str) -> None:
    folder = damage("modelopt").config(lambda c: c["nvfp4_moe"].update(gate=gate))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("layer", "activation", "limit"),
    [("1", "swiglustep", 5.0), ("2", "swigluoai_uninterleave", 7.0)],
)
def test_contract_with_layers_that_differ(
    load, damage, layer: str, activation: str, limit: float
) -> None:
    """Layer 1 is the only one with experts here; layer 2 is beyond the model."""
    layers = {layer: {"form": "swiglu_step", "limit": 5.0}}
    folder = damage("modelopt").config(lambda c: c["nvfp4_moe"].update(version=2, layers=layers))
    experts = load(folder)[LAYER].routed_experts
    assert experts.activation.value == activation
    assert experts.quant_method.gate.limit == limit


def test_experts_without_a_gate(load, damage) -> None:
    folder = damage("modelopt").config(lambda c: c["nvfp4_moe"].update(gate={"form": "relu2"}))
    with pytest.raises(ValueError, match=rf"{LAYER}: the checkpoint's experts apply relu2, vLLM's"):
        load(folder)


@pytest.mark.parametrize(("limit", "runs"), [(7.0, True), (5.0, False)])
def test_a_clamp_that_gpu_kernels_have_fixed(
    load, shallow: dict[str, Path], monkeypatch: pytest.MonkeyPatch, limit: float, runs: bool
) -> None:
    from quantize.experts.gates import Gate
    from vllm_nvfp4_moe import activation

    layer = load(shallow["modelopt"])[LAYER].routed_experts
    monkeypatch.setattr(activation.current_platform, "is_cpu", lambda: False)
    if runs:
        activation.apply_contract(layer, Gate("swiglu_step", limit=limit))
        assert layer.moe_config.activation.value == "swiglustep"
        return
    with pytest.raises(ValueError, match=r"swiglu_step\(limit=5\).*no kernels"):
        activation.apply_contract(layer, Gate("swiglu_step", limit=limit))


def test_newer_contract(load, damage) -> None:
    folder = damage("modelopt").config(lambda c: c["nvfp4_moe"].update(version=99))
    with pytest.raises(ValueError, match="version is 99, this package knows 1"):
        load(folder)


def test_gate_that_no_kernel_has_names_both(load, damage) -> None:
    folder = damage("modelopt").config(lambda c: c["nvfp4_moe"]["gate"].update(interleaved=True))
    with pytest.raises(ValueError, match="experts apply swiglu_oai") as caught:
        load(folder)
    assert "vLLM's layer would apply silu" in str(caught.value)


def test_checkpoint_quantized_otherwise(load, damage) -> None:
    def change(config: dict) -> None:
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}

    with pytest.raises(ValueError, match="quant_method is 'fp8'"):
        load(damage("modelopt").config(change))


def test_a_request_to_quantize_the_experts_otherwise(load, shallow: dict[str, Path]) -> None:
    for moe in (
        {"activation": "fp8_per_token"},
        {"weight": "mxfp8", "activation": "nvfp4_per_token"},
        "nvfp4_per_token",  # vLLM's word for the weights, too
    ):
        with pytest.raises(ValueError, match="remove 'moe' from --quantization-config"):
            load(shallow["modelopt"], quantization_config={"moe": moe})
    # vLLM 0.33 would do that with a layer of its own method.
    targets = {"re:.*mlp.experts": "mxfp8"}
    with pytest.raises(ValueError, match="'targets' would quantize its NVFP4 experts once more"):
        load(shallow["modelopt"], quantization_config={"targets": targets})


def test_published_layout_on_a_cpu(load, shallow_hub: Path, tmp_path: Path) -> None:
    """vLLM's native MiniMax-M3 is GPU-only; on a CPU that is one clear error."""
    from quantize.checkpoint.reader import Checkpoint
    from quantize.execute import execute
    from quantize.run.plan import plan

    with Checkpoint(shallow_hub) as source:
        execute(source, plan(source), tmp_path / "hub")
    with pytest.raises(ValueError, match=r"GPU-only model.*serve the Transformers layout"):
        load(tmp_path / "hub")


def test_damage_is_what_is_refused(load, damage) -> None:
    """The other side of every test above: the same copy, rewritten without damage, loads."""
    for layout in LAYOUTS:
        assert LAYER in load(damage(layout).tensors(lambda t: None))
