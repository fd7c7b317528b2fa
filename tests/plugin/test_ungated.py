"""Experts without a gate, which are Nemotron-H's: w13 is up alone, and ReLU² comes after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantize.experts.gates import Gate
from tests.plugin import mixed, nemotron
from tests.plugin.conftest import Damage
from tests.plugin.nemotron import EXPERTS, HIDDEN, INNER, LATENT, LAYER, STORED, TOP_K
from tests.plugin.reference import experts_of, relu2, routed
from tests.plugin.stand_ins import Routes, round_activations
from tests.plugin.test_layer import relative, routing
from tests.plugin.test_reload import check, convert_for
from vllm_nvfp4_moe.backends.cpu import forward
from vllm_nvfp4_moe.backends.cpu import method as cpu_method
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

LAYOUTS = ("modelopt", "compressed-tensors")
Load = Callable[..., dict[str, Any]]
MonkeyPatch = pytest.MonkeyPatch


def truth(
    folder: Path, layout: str, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor,
    stored: str = STORED, experts: int = EXPERTS,
) -> torch.Tensor:  # fmt: skip
    """What the experts of a quantized folder make of ``x``, in float64."""
    matrices = experts_of(folder, stored, layout, experts, ("up_proj", "down_proj"))
    return routed(x, matrices, weights, ids, relu2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("latent", [LATENT, None])
def test_experts_match_the_reference(
    load: Load, ungated: dict[str, Path], tmp_path: Path, layout: str, latent: int | None
) -> None:
    """With the hidden size of the model's, and with one of the experts' own."""
    folder = ungated[layout]
    if latent is None:
        source = nemotron.write(tmp_path / "bf16", moe_latent_size=None)
        folder = nemotron.quantized(source, tmp_path / layout, layout)
    layer = load(folder, dtype="float32")[LAYER].routed_experts
    hidden = latent or HIDDEN
    assert layer.w13_weight.shape == (EXPERTS, INNER, hidden // 2)
    assert layer.w13_weight_scale_2.shape == (EXPERTS,)
    assert layer.quant_method.gate == Gate("relu2")
    found = layer.quant_method.context.self_check
    assert found.skipped is None and 0 < found.worst < 1e-5
    torch.manual_seed(0)
    for tokens in (1, 7, 300):  # 300 take the path with one matrix product an expert
        x = torch.randn(tokens, hidden)
        weights, ids = routing(tokens, EXPERTS, TOP_K)
        out = layer.quant_method.apply(layer, x, weights, ids, None, None)
        assert relative(out, truth(folder, layout, x, weights, ids)) < 1e-5, tokens


@pytest.mark.parametrize("stacked", [False, True])
def test_on_the_fly(
    load: Load, ungated_bf16: Path, ungated: dict[str, Path], tmp_path: Path, stacked: bool
) -> None:
    """Bit for bit what the offline export has; up has nothing to wait for."""
    folder, export = ungated_bf16, ungated["modelopt"]
    if stacked:
        folder = nemotron.stacked(ungated_bf16, tmp_path / "stacked")
        export = nemotron.quantized(folder, tmp_path / "export")
    offline = load(export)[LAYER].routed_experts
    layer = load(folder, hf_overrides={"nvfp4_moe": contract(Gate("relu2"))})[LAYER].routed_experts
    names = dict(layer.named_parameters())
    assert {"w13_weight", "w13_weight_scale", "w13_weight_scale_2", "w2_weight"} <= names.keys()
    for name, parameter in names.items():
        want = getattr(offline, name).data
        assert torch.equal(parameter.data.view(torch.uint8), want.view(torch.uint8)), name
    assert not layer.quant_method.loads.waiting


def contract(gate: Gate) -> dict[str, Any]:
    return {"version": 1, "gate": {"form": gate.form}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_and_widths_by_layer(
    load: Load, tmp_path: Path, layout: str, summary_lines: list[str]
) -> None:
    """Nemotron Puzzle, whose config is code of the checkpoint's own."""
    sizes = [(8, 48), (6, 32), (8, 80)]
    source = nemotron.write_puzzle(tmp_path / "bf16", sizes)
    folder = nemotron.quantized(source, tmp_path / layout, layout)
    shutil.copy(source / "configuration_nemotron_h_puzzle.py", folder)
    runners = load(folder, dtype="float32", trust_remote_code=True)
    torch.manual_seed(0)
    for number, (experts, inner) in enumerate(sizes):
        at = f"layers.{2 * number + 1}.mixer.experts"
        layer = runners[f"model.{at}"].routed_experts
        assert layer.w13_weight.shape == (experts, inner, LATENT // 2)
        x = torch.randn(5, LATENT)
        weights, ids = routing(5, experts, TOP_K)
        out = layer.quant_method.apply(layer, x, weights, ids, None, None)
        want = truth(folder, layout, x, weights, ids, f"backbone.{at}", experts)
        assert relative(out, want) < 1e-5, number
    (line,) = summary_lines
    assert line.startswith("NVFP4 experts: 3 layers x 8 or 6 experts, ")


def test_groups_that_name_the_projections(
    load: Load, ungated: dict[str, Path], tmp_path: Path
) -> None:
    """As llm-compressor may: no pattern matches the projection that these experts do not have."""

    def name_them(config: dict[str, Any]) -> None:
        (group,) = config["quantization_config"]["config_groups"].values()
        group["targets"] = [r"re:.*mixer\.experts\.\d+\.(up|down)_proj$"]

    folder = damaged(ungated, tmp_path, "compressed-tensors").config(name_them)
    assert isinstance(load(folder)[LAYER].routed_experts.quant_method, CpuMethod)


def test_mixed_with_fp8(load: Load, ungated: dict[str, Path], tmp_path: Path) -> None:
    """NVIDIA's Super and Ultra: a list of layers, here with experts alone in it."""
    folder = mixed.write(ungated["modelopt"], tmp_path / "mixed", map_in_config=True)
    layer = load(folder, dtype="float32")[LAYER].routed_experts
    x, (weights, ids) = torch.randn(3, LATENT), routing(3, EXPERTS, TOP_K)
    out = layer.quant_method.apply(layer, x, weights, ids, None, None)
    assert relative(out, truth(ungated["modelopt"], "modelopt", x, weights, ids)) < 1e-5


@pytest.mark.parametrize(
    ("kernel", "source"),
    [
        *((None, source) for source in (*LAYOUTS, "on the fly")),
        ("VLLM_CUTLASS", "modelopt"),
        ("FLASHINFER_CUTLASS", "on the fly"),
        ("hopper bf16", "modelopt"),
        ("hopper fp8", "on the fly"),
    ],
)
def test_reload(
    load: Load, ungated_bf16: Path, ungated: dict[str, Path], tmp_path: Path,
    monkeypatch: MonkeyPatch, kernel: str | None, source: str,
) -> None:  # fmt: skip
    """On a CPU, or converted for a GPU's kernels, which pad what has no gate."""
    if kernel is not None:
        convert_for(kernel, monkeypatch)
    other = nemotron.write(tmp_path / "other", seed=1)
    if source == "on the fly":
        pair = [
            Damage(folder, tmp_path / f"copy-{n}") for n, folder in enumerate((ungated_bf16, other))
        ]
        stated = {"nvfp4_moe": contract(Gate("relu2"))}
        check(load, *(copy.config(lambda c: c.update(stated)) for copy in pair))
        return
    check(load, ungated[source], nemotron.quantized(other, tmp_path / "quantized", source))


# -- what is refused -------------------------------------------------------------------------------


def damaged(ungated: dict[str, Path], tmp_path: Path, layout: str = "modelopt") -> Damage:
    return Damage(ungated[layout], tmp_path / "damaged")


@pytest.mark.parametrize("form", ["silu", "relu"])
def test_a_contract_that_is_not_the_layers(
    load: Load, ungated: dict[str, Path], tmp_path: Path, form: str
) -> None:
    """One with a gate, which there is none for; and one that vLLM has no name for."""
    folder = damaged(ungated, tmp_path).config(lambda c: c["nvfp4_moe"].update(gate={"form": form}))
    with pytest.raises(ValueError, match=rf"{LAYER}: .* apply {form}, .* relu2_no_mul, .*refusing"):
        load(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_is_missing(
    load: Load, ungated: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    copy = damaged(ungated, tmp_path, layout)
    folder = copy.tensors(lambda t: t.pop(f"{STORED}.3.up_proj.weight_scale"))
    with pytest.raises(ValueError, match=rf"{LAYER}: missing .*: expert 3, up \(w1\), weight_sca"):
        load(folder)


def test_experts_that_are_not_ours(load: Load, ungated: dict[str, Path], tmp_path: Path) -> None:
    """On a CPU vLLM has no kernels for them, and says so, if later than by itself."""

    def exclude(config: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"].append("backbone.layers.3.mixer.experts*")

    source = nemotron.write(tmp_path / "bf16", "*E*E")
    nemotron.quantized(source, tmp_path / "nvfp4")
    copy = Damage(tmp_path / "nvfp4", tmp_path / "damaged")

    def floats(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "layers.3.mixer.experts" in n]:
            del tensors[name]
        plain = nemotron.tensors_of(json.loads((source / "config.json").read_text()))
        tensors |= {n: t for n, t in plain.items() if "layers.3.mixer.experts" in n}

    copy.tensors(floats)
    with pytest.raises(NotImplementedError, match="No Unquantized MoE backend supports"):
        load(copy.config(exclude))


def test_models_of_others_are_refused_as_ever(load: Load, ungated_bf16: Path) -> None:
    with pytest.raises(NotImplementedError, match="is_act_and_mul=False is supported only for"):
        load(ungated_bf16, None)


# -- the self-check --------------------------------------------------------------------------------

WRONG = {
    "not squared": lambda up: up.clamp(min=0),
    "SiLU": torch.nn.functional.silu,
    "GELU": torch.nn.functional.gelu,
    "none": lambda up: up,
    "squared on both sides": lambda up: up.square(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_applies_another_activation(
    load: Load, ungated: dict[str, Path], monkeypatch: MonkeyPatch, wrong: str
) -> None:
    class Other(Gate):
        def apply_stacked(self, gate_up: torch.Tensor) -> torch.Tensor:
            return WRONG[wrong](gate_up)

    monkeypatch.setattr(forward, "Gate", lambda *_: Other("relu2"))
    for module in (forward, cpu_method):
        monkeypatch.setattr(module, "FORMS", {})
    with pytest.raises(ValueError, match=f"{LAYER}: self-check: the CPU kernel does not") as caught:
        load(ungated["modelopt"])
    assert wrong != "not squared" or "nearer to what relu would give" in str(caught.value)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 2e-5])
@pytest.mark.parametrize("wrong", [None, "not squared"])
def test_with_4_bit_activations(
    load: Load, ungated: dict[str, Path], tmp_path: Path, monkeypatch: MonkeyPatch,
    scale: float, wrong: str | None,
) -> None:  # fmt: skip
    """As Blackwell's. Squares spread far, so that calibrated input scales may be small for them:
    where all saturate, no activation could be told from another."""

    def calibrate(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("down_proj.input_scale"):
                tensor.fill_(scale)

    round_activations(monkeypatch, Gate("relu") if wrong else None)
    folder = damaged(ungated, tmp_path).tensors(calibrate)
    if wrong is None:
        found = load(folder)[LAYER].routed_experts.quant_method.context.self_check
        assert found.skipped is None and 0 < found.worst < 0.2
        return
    with pytest.raises(ValueError, match="self-check: the CPU kernel does not compute what"):
        load(folder)


@pytest.mark.parametrize("wrong", [None, "not squared", "negative scores", "scaled", "no bias"])
def test_a_kernel_that_routes(
    load: Load, ungated: dict[str, Path], monkeypatch: MonkeyPatch, wrong: str | None
) -> None:
    """As TRT-LLM's, which gave wrong text for Nemotron-3 Nano (vLLM's issue 52308)."""
    routes = Routes(monkeypatch, 0.0 if wrong == "negative scores" else -torch.inf, False)
    route = routes.route

    def other(layer: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if wrong == "no bias":  # for the choice
            biased = SimpleNamespace(
                e_score_correction_bias=torch.zeros(EXPERTS), top_k=layer.top_k
            )
            return route(biased, logits)
        weights, ids = route(layer, logits)
        return weights * (2.5 if wrong == "scaled" else 1.0), ids  # which vLLM does afterwards

    monkeypatch.setattr(routes, "route", other)
    if wrong == "not squared":
        monkeypatch.setattr(forward, "Gate", lambda *_: Gate("relu"))
        for module in (forward, cpu_method):
            monkeypatch.setattr(module, "FORMS", {})
    if wrong is None:
        found = load(ungated["modelopt"])[LAYER].routed_experts.quant_method.context.self_check
        assert found.skipped is None and 0 < found.worst < 8e-3
        return
    with pytest.raises(ValueError, match=f"{LAYER}: self-check: the CPU kernel does not compute"):
        load(ungated["modelopt"])
