"""The accuracy bench's simulated experts: beside Transformers' own, and beside vLLM's emulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.simulate import (
    Simulated,
    experts_of,
    own_experts,
    round_four_six,
    simulated,
    weights_in_e4m3,
)
from benchmarks.stored import Experts, read
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.experts.gates import Gate, Gates
from quantize.layouts import LAYOUTS
from quantize.nvfp4.activations import round_nvfp4, round_rows_e4m3
from quantize.nvfp4.format import NvFp4
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.benchmarks import tiny
from tests.gpu.reference import clamped_swiglu_oai, nearest_nvfp4, silu_gate
from tests.quantize import checkpoints

GATES = {
    "qwen3": Gate("silu"),
    "m3": Gate("swiglu_oai", alpha=1.702, beta=1.0, limit=7.0),
}
FORMULAS = {"qwen3": silu_gate, "m3": clamped_swiglu_oai}
PLAIN = torch.device("cpu"), torch.float32


def emulation() -> Any:
    """vLLM's functions that emulate NVFP4 in plain PyTorch."""
    return pytest.importorskip(
        "vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils"
    )


def hard_values() -> torch.Tensor:
    """``[rows, 64]``: blocks of many magnitudes, ties, zeros and what E4M3 cannot hold."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(96, 64, generator=generator) * torch.logspace(-6, 4, 96).unsqueeze(1)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(8)
    return torch.cat((rows, ties.unsqueeze(0), -ties.unsqueeze(0), torch.zeros(1, 64)))


@pytest.mark.parametrize("input_scale", [1.0, 1 / 2688, 0.37 / 2688, 3e-7, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_vllms_emulation_bit_for_bit(input_scale: float, dtype: torch.dtype) -> None:
    x, scale = hard_values().to(dtype), torch.tensor(input_scale)
    expected = emulation().ref_nvfp4_quant_dequant(x, 1.0 / scale, 16)
    assert torch.equal(round_nvfp4(x, scale), expected)


def test_rounding_with_a_scale_of_one_is_the_gpu_tests_reference() -> None:
    x = hard_values()
    assert torch.equal(round_nvfp4(x, torch.ones(())), nearest_nvfp4(x))


def test_each_row_can_have_its_own_scale() -> None:
    x = hard_values()
    scales = torch.logspace(-6, 1, len(x))
    alone = [round_nvfp4(row[None], scale) for row, scale in zip(x, scales, strict=True)]
    assert torch.equal(round_nvfp4(x, scales), torch.cat(alone))


E4M3 = torch.tensor(
    sorted(
        {0.0}
        | {2.0 ** (exponent - 7) * (1 + m / 8) for exponent in range(1, 16) for m in range(8)}
        | {2.0**-9 * m for m in range(8)}
    )[:-1],  # the last would be 480, which is NaN
    dtype=torch.float64,
)


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Of E4M3's values, ties to the even one."""
    size = x.double().abs()
    above = torch.searchsorted(E4M3, size).clamp(max=len(E4M3) - 1)
    below = (above - 1).clamp(min=0)
    up, down = E4M3[above] - size, size - E4M3[below]
    upward = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(upward, E4M3[above], E4M3[below]) * x.sign()


def to_a_target(block: torch.Tensor, input_scale: float, target: float) -> torch.Tensor:
    """A block of 16, its largest value at ``target``, in float64."""
    ratio = torch.tensor([float(block.abs().max()) / target / input_scale], dtype=torch.float64)
    scale = float(nearest_e4m3(ratio.clamp(max=448)).item()) * input_scale
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    if scale == 0:
        return torch.zeros(16, dtype=torch.float64)
    nearest = (block.abs()[:, None] / scale - grid).abs().argmin(1)
    return grid[nearest] * scale * block.sign()


@pytest.mark.parametrize("input_scale", [1 / 2688, 0.37 / 2688, 0.01])
def test_four_over_six_takes_what_loses_less(input_scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator) * torch.logspace(-3, 0.5, 40).unsqueeze(1)
    found = round_four_six(x, torch.tensor(input_scale)).double()
    fours = 0
    for block, own in zip(x.double().view(-1, 16), found.view(-1, 16), strict=True):
        six, four = (to_a_target(block, input_scale, target) for target in (6.0, 4.0))
        lost = [float((each - block).abs().sum()) for each in (six, four)]
        fours += lost[1] < lost[0]
        torch.testing.assert_close(own, four if lost[1] < lost[0] else six, rtol=1e-5, atol=1e-12)
    assert 20 < fours < 140  # of 160 blocks, so that both are tried


def test_eight_bits_have_a_scale_for_each_token() -> None:
    x = hard_values()
    largest = x.abs().amax(1, keepdim=True)
    scale = torch.where(largest == 0, torch.ones(()), largest / 448)
    expected = nearest_e4m3(x / scale).float() * scale
    assert torch.equal(round_rows_e4m3(x), expected)
    assert round_rows_e4m3(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("scales", "rounded"), [("token", round_nvfp4), ("token-four-six", round_four_six)]
)
def test_tokens_have_scales_of_their_own(scales: str, rounded: Any) -> None:
    """Whatever the checkpoint's are: each row alone, with an input scale from its own largest."""
    model = tiny.model("qwen3")
    module: Any = next(iter(experts_of(model).values()))
    experts = Experts(module.gate_up_proj.detach(), module.down_proj.detach(), None)
    hidden, chosen, weights = batch(module)
    hidden, weights = hidden.float(), weights.float()
    found = Simulated(experts, GATES["qwen3"], scales, *PLAIN)(hidden, chosen, weights)
    expected = torch.zeros_like(hidden)
    for token, row in enumerate(hidden):
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            seen = rounded(row[None], row.abs().max() / 2688)
            middle = silu_gate(*(seen @ experts.gate_up[expert].T).chunk(2, -1))
            seen = rounded(middle, middle.abs().max() / 2688)
            expected[token] += weight * (seen @ experts.down[expert].T)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_in_eight_bits() -> None:
    """Every code with every block scale: exact but for the fifth digit, or among the smallest."""
    codes = torch.arange(16).repeat(126, 1)
    block_scale = torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).view(126, 1)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    weight = NvFp4(packed, block_scale, torch.tensor(0.37))
    # 6 x 448 is 2^3 times too much.
    expected = nearest_e4m3(weight._replace(global_scale=torch.ones(())).dequantize() / 8) * 8
    assert torch.equal(weights_in_e4m3(weight), expected.float() * 0.37)
    zeros = NvFp4(torch.zeros_like(packed), torch.zeros_like(block_scale), torch.ones(()))
    assert not weights_in_e4m3(zeros).count_nonzero()


def batch(module: Any, tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, chosen experts and router weights; some tokens choose the same expert."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, module.hidden_dim, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, module.num_experts - 1, generator=generator, dtype=torch.float64)
    weights, chosen = scores.topk(2)  # the last expert gets no token
    return hidden, chosen, weights


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_without_rounded_inputs_it_is_transformers_own_experts(architecture: str) -> None:
    model = tiny.model(architecture).double()
    module = next(iter(experts_of(model).values()))
    model.set_experts_implementation("eager")
    layers = own_experts(model, Gates.uniform(GATES[architecture]))
    experts = Simulated(layers[1], GATES[architecture], None, torch.device("cpu"), torch.float64)
    module = experts_of(model)[1]
    with torch.no_grad():
        expected = module(*batch(module))
    assert torch.allclose(experts(*batch(module)), expected, rtol=1e-12, atol=1e-14)


def quantized(architecture: str, layout: str, folder: Path) -> Path:
    """A tiny model in NVFP4, with an input scale of its own for every expert and projection."""
    with Checkpoint(tiny.save(architecture, folder / "source")) as source:
        execute(source, plan(source, Options(layout=layout, activations=True)), folder / "nvfp4")
    file = folder / "nvfp4" / "model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if name.endswith(LAYOUTS[layout].suffixes[3]):
            scale = torch.rand(tensor.shape, generator=generator) / 500 + 1e-4
            tensors[name] = scale.reciprocal() if LAYOUTS[layout].reciprocal else scale
    save_file(tensors, file, metadata={"format": "pt"})
    return folder / "nvfp4"


def vllms(
    architecture: str,
    layout: str,
    folder: Path,
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    shared: bool,
) -> torch.Tensor:
    """Layer 1's routed experts by vLLM's emulation of a linear layer, from the file's own bytes."""
    tensors = load_file(folder / "model.safetensors")
    codes, block_scale, global_scale, input_scale = LAYOUTS[layout].suffixes
    prefix = "model.layers.1.mlp.experts"

    def inputs(expert: int, projections: tuple[str, ...]) -> torch.Tensor:
        names = [f"{prefix}.{expert}.{projection}.{input_scale}" for projection in projections]
        found = [tensors[name].reshape(()) for name in names]
        return torch.stack([1 / s if LAYOUTS[layout].reciprocal else s for s in found]).max()

    def product(x: torch.Tensor, expert: int, projection: str, scale: torch.Tensor) -> torch.Tensor:
        module = f"{prefix}.{expert}.{projection}"
        multiplies = tensors[f"{module}.{global_scale}"].reshape(())
        if LAYOUTS[layout].reciprocal:
            multiplies = 1 / multiplies
        return emulation().run_nvfp4_emulations(
            x,
            1 / scale,
            tensors[f"{module}.{codes}"],
            tensors[f"{module}.{block_scale}"],
            multiplies,
            swizzle=False,
        )

    pairs = ("gate_proj", "up_proj"), ("down_proj",)
    scales = [[inputs(expert, pair) for expert in range(4)] for pair in pairs]
    if shared:
        scales = [[max(s)] * 4 for s in scales]
    out = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (product(hidden[token], expert, p, scales[0][expert]) for p in pairs[0])
        middle = FORMULAS[architecture](gate, up)
        result = product(middle, expert, "down_proj", scales[1][expert])
        out.index_add_(0, token, result * weights[token, slot].unsqueeze(1))
    return out


@pytest.mark.parametrize("scales", ["shared", "expert"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_rounded_inputs_and_read_weights_are_vllms_emulation(
    architecture: str, layout: str, scales: str, tmp_path: Path
) -> None:
    folder = quantized(architecture, layout, tmp_path)
    layers, contract = read(folder)
    assert contract is not None and contract.default == GATES[architecture]
    module = experts_of(tiny.model(architecture))[1]
    hidden, chosen, weights = (t.float() if t.is_floating_point() else t for t in batch(module))
    found = Simulated(layers[1], contract.default, scales, *PLAIN)(hidden, chosen, weights)
    expected = vllms(architecture, layout, folder, hidden, chosen, weights, scales == "shared")
    # Sums in another order can move a value across a boundary of the second rounding: few may.
    close = torch.isclose(found, expected, rtol=1e-4, atol=1e-5)
    assert close.float().mean() > 0.97
    assert (found - expected).norm() < 2e-3 * expected.norm()
    other = Simulated(
        layers[1], contract.default, {"shared": "expert", "expert": "shared"}[scales], *PLAIN
    )
    assert (other(hidden, chosen, weights) - expected).norm() > 2e-2 * expected.norm()


def test_a_model_computes_with_them_only_within() -> None:
    model = tiny.model("m3")
    ids = torch.arange(3, 40)[None]
    gates = Gates.uniform(GATES["m3"])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with simulated(model, own_experts(model, gates), gates, None):
            assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
        with simulated(model, own_experts(model, gates), gates, "shared"):
            assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-3)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_other_experts_are_refused() -> None:
    model = tiny.model("m3")
    gates = Gates.uniform(GATES["m3"])
    experts = own_experts(model, gates)[1]
    with (
        pytest.raises(ValueError, match="layer 0 has no experts"),
        simulated(model, {0: experts}, gates, None),
    ):
        pass
    fewer = Experts(experts.gate_up[:3], experts.down[:3], None)
    with (
        pytest.raises(ValueError, match="layer 1: experts"),
        simulated(model, {1: fewer}, gates, None),
    ):
        pass


def test_a_folder_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    folder = quantized("qwen3", "modelopt", tmp_path)
    file = folder / "model.safetensors"
    whole = load_file(file)
    for name in ("model.layers.1.mlp.experts.2.up_proj", "model.layers.0.mlp.experts.3.down_proj"):
        for suffix, said in (("weight_scale", "weight_scale is missing"), ("weight", "incomplete")):
            damaged = {k: v for k, v in whole.items() if k != f"{name}.{suffix}"}
            save_file(damaged, file, metadata={"format": "pt"})
            with pytest.raises(QuantizeError, match=said):
                read(folder)
    weights_only = {k: v for k, v in whole.items() if not k.endswith("input_scale")}
    save_file(weights_only, file, metadata={"format": "pt"})
    assert read(folder)[0][1].input_scales is None


def test_experts_with_biases_are_not_simulated_without_them() -> None:
    model = checkpoints.build("gpt_oss")
    with pytest.raises(ValueError, match="has biases, which are not simulated"):
        experts_of(model)
