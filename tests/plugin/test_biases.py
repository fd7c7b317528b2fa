"""Experts with biases: GPT-OSS, through vLLM's own class for it, on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantize.experts.gates import Gate
from tests.plugin import biased, others
from tests.plugin.biased import EXPERTS, HIDDEN, INNER
from tests.plugin.reference import dequantize
from tests.plugin.test_layer import relative, routing
from tests.plugin.test_reload import bits, check, convert_for
from tests.quantize.plain import plainly as quantized_plainly
from vllm_nvfp4_moe.backends.cpu import forward
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

LAYER = "model.layers.0.mlp.experts"
LAYOUTS = ("modelopt", "compressed-tensors")
Folders = dict[str, Path]
Load = Callable[..., dict[str, Any]]
MonkeyPatch = pytest.MonkeyPatch


def make(parent: Path, **options: Any) -> Folders:
    """The tiny GPT-OSS in bfloat16, and quantized in each layout."""
    source = biased.save(parent / "bf16", **options)
    return {"bf16": source} | {
        layout: others.quantized(source, parent / layout, layout=layout) for layout in LAYOUTS
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make(tmp_path_factory.mktemp("biased"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """With other numbers in every tensor."""
    return make(tmp_path_factory.mktemp("biased"), seed=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_match_both_references(load: Load, folders: Folders, layout: str) -> None:
    """A plain loop, and Transformers' own module, which has gate and up alternate."""
    layer = load(folders[layout], dtype="float32")[LAYER].routed_experts
    check = layer.quant_method.context.self_check
    assert check.skipped is None and check.worst < 1e-5
    module = biased.transformers_module(folders[layout], LAYER, layout)
    torch.manual_seed(0)
    for tokens in (1, 7, 120):  # 120 take the path with one matrix product an expert
        x = torch.randn(tokens, HIDDEN) * 3
        weights, ids = routing(tokens, EXPERTS, 2)
        out = layer.quant_method.apply(layer, x, weights, ids, None, None)
        truth = biased.plainly(folders[layout], LAYER, layout, x, weights, ids)
        with torch.no_grad():
            theirs = module(x.double(), ids.long(), weights.double())
        assert relative(theirs, truth) < 1e-12
        assert relative(out, truth) < 1e-5, tokens


def test_bfloat16(load: Load, folders: Folders) -> None:
    """Biases have the source's numbers: only activations are rounded."""
    layer = load(folders["modelopt"])[LAYER].routed_experts
    torch.manual_seed(0)
    for tokens in (1, 120):
        x = torch.randn(tokens, HIDDEN).bfloat16()
        weights, ids = routing(tokens, EXPERTS, 2)
        out = layer.quant_method.apply(layer, x, weights, ids, None, None)
        truth = biased.plainly(folders["modelopt"], LAYER, "modelopt", x, weights, ids)
        assert relative(out, truth) < 6e-3, tokens


def test_on_the_fly_is_the_offline_export(load: Load, folders: Folders) -> None:
    """Stacks of plain floats, which vLLM's class copies around the parameters' loaders."""
    offline, layer = (
        load(folders[name])[LAYER].routed_experts for name in ("modelopt", "bf16")
    )  # fmt: skip
    assert str(layer.quant_method.gate) == "swiglu_oai(alpha=1.702, beta=1, limit=7)"
    want, got = (dict(each.named_parameters()) for each in (offline, layer))
    assert want.keys() == got.keys() and {"w13_bias", "w2_bias"} < want.keys()
    for name, tensor in want.items():
        assert torch.equal(bits(got[name]), bits(tensor)), name


def test_stacks_as_modelopt_writes_them(load: Load, folders: Folders, tmp_path: Path) -> None:
    """``[experts, in, out]`` with codes and block scales along in, gate and up alternating, and one
    global and input scale for all experts (ModelOpt's ``unified_export_hf.py``)."""
    made = random_stacks()
    config = json.loads((folders["modelopt"] / "config.json").read_text())
    del config["nvfp4_moe"]
    config["quantization_config"]["quant_algo"] = "NVFP4"
    tensors = {f"{LAYER}.{name}": tensor for name, tensor in made.items()}
    dropped = [n for n in load_file(folders["modelopt"] / "model.safetensors") if ".experts." in n]
    folder = biased.damaged(
        folders["modelopt"], tmp_path / "modelopt", **dict.fromkeys(dropped), **tensors
    )
    (folder / "config.json").write_text(json.dumps(config))
    layer = load(folder, dtype="float32")[LAYER].routed_experts
    for expert in range(EXPERTS):
        for first, rows in ((0, slice(0, INNER)), (1, slice(INNER, None))):
            for name, parameter in (
                ("", layer.w13_weight),
                ("_weight_scale", layer.w13_weight_scale),
            ):
                want = made[f"gate_up_proj{name}"][expert, :, first::2].T
                assert torch.equal(bits(parameter[expert, rows]), bits(want)), name
            want = made["gate_up_proj_bias"][expert, first::2]
            assert torch.equal(layer.w13_bias[expert, rows], want.float())
        assert torch.equal(layer.w2_weight[expert], made["down_proj"][expert].T)
        assert torch.equal(layer.w2_bias[expert], made["down_proj_bias"][expert].float())
    assert torch.all(layer.w13_weight_scale_2 == made["gate_up_proj_weight_scale_2"])
    assert torch.all(layer.w2_weight_scale_2 == made["down_proj_weight_scale_2"])
    assert layer.quant_method.context.self_check.worst < 1e-5


def random_stacks() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(6)
    made: dict[str, torch.Tensor] = {}
    for name, inputs, outputs in (
        ("gate_up_proj", HIDDEN, 2 * INNER),
        ("down_proj", INNER, HIDDEN),
    ):
        sizes = EXPERTS, inputs // 2, outputs
        made[name] = torch.randint(0, 256, sizes, generator=random, dtype=torch.uint8)
        scales = torch.randint(0x30, 0x50, (EXPERTS, inputs // 16, outputs), generator=random)
        made[f"{name}_weight_scale"] = scales.to(torch.uint8).view(torch.float8_e4m3fn)
        made[f"{name}_weight_scale_2"] = torch.rand((), generator=random) * 0.01
        made[f"{name}_input_scale"] = torch.tensor(0.5)
        made[f"{name}_bias"] = torch.randn(EXPERTS, outputs, generator=random).bfloat16()
    return made


def test_of_halves_that_may_be_mixed_there_is_a_warning(
    load: Load, folders: Folders, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    from vllm_nvfp4_moe.loading import gpt_oss

    said: list[str] = []
    monkeypatch.setattr(
        gpt_oss.logger, "warning_once", lambda text, *args: said.append(text % args)
    )
    for layout in LAYOUTS:
        load(folders[layout])  # with a contract
        folder = biased.damaged(folders[layout], tmp_path / layout)
        config = json.loads((folder / "config.json").read_text())
        del config["nvfp4_moe"]
        (folder / "config.json").write_text(json.dumps(config))
        assert said == []
        load(folder)
    assert "before September 2026 (pull request 3100) split GPT-OSS's stacks in halves" in said[0]


@pytest.mark.usefixtures("compiled_by")
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("tokens", [5, 200])
def test_biases_come_before_the_gate_and_the_routers_weight(tokens: int, on_input: bool) -> None:
    """Also where the router's weight is for the input, which biases are added to afterwards."""
    torch.manual_seed(2)
    w13 = [quantized_plainly([torch.randn(64, 48) / 5])[0] for _ in range(3)]
    w2 = [quantized_plainly([torch.randn(48, 32) / 5])[0] for _ in range(3)]
    b13, b2 = torch.randn(3, 64), torch.randn(3, 48)
    stacked = [
        torch.stack([getattr(w, field) for w in weights])
        for weights in (w13, w2)
        for field in ("codes", "block_scale", "global_scale")
    ]
    expert_map = torch.tensor([-1, 0, -1, 1, 2], dtype=torch.int32)
    x = torch.randn(tokens, 48)
    factors, ids = routing(tokens, experts=5, k=2)
    out = forward.experts_forward(
        x, *stacked, factors, ids, expert_map, "silu", 1.0, 0.0, None, on_input, b13, b2
    )
    truth = torch.zeros(tokens, 48, dtype=torch.float64)
    for token in range(tokens):
        for factor, place in zip(
            factors[token].double(), expert_map[ids[token].long()].tolist(), strict=True
        ):
            if place < 0:
                continue
            before, after = (factor, 1.0) if on_input else (1.0, factor)
            both = dequantize(*w13[place]) @ (x[token].double() * before) + b13[place].double()
            gate, up = both.chunk(2)
            middle = torch.nn.functional.silu(gate) * up
            truth[token] += after * (dequantize(*w2[place]) @ middle + b2[place].double())
    assert relative(out, truth) < 1e-5


def test_a_hidden_size_that_is_padded(
    load: Load, folders: Folders, monkeypatch: MonkeyPatch
) -> None:
    """What lies in w2's padding is not added to anything."""
    empty = torch.empty

    def dirty(*shape: int, **more: Any) -> torch.Tensor:
        tensor = empty(*shape, **more)
        return (
            tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.ndim == 2 else tensor
        )

    monkeypatch.setattr(torch, "empty", dirty)
    monkeypatch.setattr(
        CpuMethod, "maybe_roundup_sizes", lambda self, hidden, inner, *_: (128, inner)
    )
    layer = load(folders["modelopt"], dtype="float32")[LAYER].routed_experts
    assert layer.w2_bias.shape == (EXPERTS, 128)
    assert layer.quant_method.context.self_check.skipped is None
    x = torch.randn(5, HIDDEN)
    weights, ids = routing(5, EXPERTS, 2)
    padded = torch.nn.functional.pad(x, (0, 64))
    out = layer.quant_method.apply(layer, padded, weights, ids, None, None)
    truth = biased.plainly(folders["modelopt"], LAYER, "modelopt", x, weights, ids)
    assert relative(out[:, :HIDDEN], truth) < 1e-5
    assert torch.all(out[:, HIDDEN:] == 0)


# -- reloading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [*LAYOUTS, "bf16"])
def test_reload(load: Load, folders: Folders, other: Folders, source: str) -> None:
    check(load, folders[source], other[source])


def test_reload_for_marlin(
    load: Load, folders: Folders, other: Folders, monkeypatch: MonkeyPatch
) -> None:
    for_marlin(monkeypatch)
    check(load, folders["modelopt"], other["modelopt"])


# -- what Marlin is given ----------------------------------------------------------------------


def for_marlin(monkeypatch: MonkeyPatch) -> None:
    """Layers are converted for Marlin by vLLM's own code, but for the order of the codes."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_fp4

    convert_for("MARLIN", monkeypatch)
    monkeypatch.setattr(marlin_utils_fp4, "_repack_marlin_experts", lambda weight, *_: weight)


def from_marlin(bias: torch.Tensor) -> torch.Tensor:
    """Columns in order: of 32, a thread has two neighbours out of each eight (marlin_template.h,
    where ``frag_bias`` is read as scales of whole columns are)."""
    order = [
        2 * thread + 8 * eight + one for thread in range(4) for eight in range(4) for one in (0, 1)
    ]
    runs = bias.unflatten(1, (-1, 32))
    back = torch.empty_like(runs)
    back[..., order] = runs
    return back.flatten(1)


def test_what_marlin_adds(load: Load, folders: Folders, monkeypatch: MonkeyPatch) -> None:
    """Its epilogues: ``product * scale + bias`` for w13, and for w2, where it applies the router's
    weight too, ``(product + bias) * (weight * scale)``."""
    for_marlin(monkeypatch)
    layer = load(folders["modelopt"])[LAYER].routed_experts
    config = layer.quant_method.moe_quant_config
    want = biased.biases_of(folders["modelopt"], LAYER)
    rows = from_marlin(config.w1_bias).unflatten(1, (2, -1))
    assert rows.shape == (EXPERTS, 2, 128)  # vLLM pads 64 to 128 for a hidden size of 64
    assert torch.all(rows[..., INNER:] == 0)
    added = from_marlin(config.w2_bias).double() * config.g2_alphas.double().unsqueeze(1)
    for expert, (gate, up, down) in enumerate(want):
        assert torch.equal(rows[expert, 0, :INNER].double(), gate)
        assert torch.equal(rows[expert, 1, :INNER].double(), up)
        torch.testing.assert_close(added[expert], down, rtol=2**-8, atol=0)
    assert config.w1_bias.dtype == config.w2_bias.dtype == torch.bfloat16
    # The objects that load balancing moves between ranks.
    assert config.w1_bias is layer.w13_bias and config.w2_bias is layer.w2_bias


# -- the self-check ----------------------------------------------------------------------------


def lose(bias: str) -> Callable[[CpuMethod, Any], None]:
    prepare = CpuMethod.prepare

    def losing(self: CpuMethod, layer: Any) -> None:
        prepare(self, layer)
        getattr(layer, bias).data.zero_()

    return losing


@pytest.mark.parametrize("bias", ["w13_bias", "w2_bias"])
@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_a_kernel_without_biases(
    load: Load, tmp_path: Path, monkeypatch: MonkeyPatch, bias: str, spread: float
) -> None:
    """Small ones change less than bfloat16 rounds: then it is what the output is nearer to."""
    folder = make(tmp_path, spread=spread)["modelopt"]
    load(folder, dtype="float32")
    monkeypatch.setattr(CpuMethod, "prepare", lose(bias))
    name = bias.removesuffix("_bias")
    with pytest.raises(ValueError, match=f"nearer to what experts without {name}'s biases would"):
        load(folder, dtype="float32")


# -- refusals ----------------------------------------------------------------------------------

BIAS = f"{LAYER}.2.up_proj.bias"
BAD: dict[str, tuple[torch.Tensor | None, str]] = {
    "missing": (None, "missing from the checkpoint: expert 2, up (w3), bias"),
    "short": (torch.zeros(INNER - 1), f"expert 2, up (w3), bias: shape [{INNER - 1}], expected"),
    "not finite": (torch.full((INNER,), torch.inf), "expert 2, up (w3), bias: some are NaN or inf"),
    "integers": (torch.zeros(INNER, dtype=torch.int32), "bias: dtype torch.int32, floats are"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bias_that_is_damaged(load: Load, folders: Folders, tmp_path: Path, bad: str) -> None:
    tensor, message = BAD[bad]
    folder = biased.damaged(folders["modelopt"], tmp_path / "damaged", **{BIAS: tensor})
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{LAYER}: ") and message in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_biases_that_vllms_class_would_leave_out(load: Load, tmp_path: Path, layout: str) -> None:
    """vLLM's loader passes over biases of experts that its class does not have."""
    plain = others.quantized(others.plain(tmp_path / "bf16"), tmp_path / "nvfp4", layout=layout)
    assert LAYER in load(plain)
    name = f"{LAYER}.1.down_proj.bias"
    folder = biased.damaged(plain, tmp_path / "biased", **{name: torch.zeros(others.HIDDEN)})
    with pytest.raises(ValueError, match=f"{LAYER}: the checkpoint has {name}, and vLLM's class"):
        load(folder)


# -- the choice of kernels ---------------------------------------------------------------------

M3 = Gate("swiglu_oai", 1.702, 1.0, 7.0)


def with_biases(moe_backend: str = "auto") -> Any:
    from tests.plugin.blackwell import moe_config

    config = moe_config(M3, moe_backend=moe_backend)
    config.has_bias = True
    return config


@pytest.mark.parametrize(
    ("capability", "backend", "silent"),
    [
        ((9, 0), "HUMMING", []),
        (
            (10, 0),
            "MARLIN",
            ["FLASHINFER_TRTLLM", "FLASHINFER_CUTEDSL", "FLASHINFER_CUTLASS", "VLLM_CUTLASS"],
        ),
        ((12, 0), "MARLIN", ["FLASHINFER_CUTLASS", "VLLM_CUTLASS"]),
    ],
)
def test_kernels_that_add_biases(
    monkeypatch: MonkeyPatch, capability: tuple[int, int], backend: str, silent: list[str]
) -> None:
    """Of those that vLLM prefers, some would leave biases out without a word."""
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    from tests.plugin.blackwell import pretend
    from vllm_nvfp4_moe.backends.selection import select

    pretend(monkeypatch, capability)
    for inputs in (keys.kNvfp4Dynamic, None):
        chosen = select(with_biases(), keys.kNvfp4Static, inputs, M3)
        assert chosen.backend.value == backend
    passed_over = select(with_biases(), keys.kNvfp4Static, keys.kNvfp4Dynamic, M3).passed_over
    assert [n for n, reason in passed_over if "add no biases to experts" in reason] == silent
    asked = {"flashinfer_cutlass": "add no biases", "emulation": "does not support bias"}
    for name, reason in asked.items() if capability == (10, 0) else ():
        with pytest.raises(ValueError, match=rf"{M3.form}.* and have biases: .*{reason}"):
            select(with_biases(name), keys.kNvfp4Static, keys.kNvfp4Dynamic, M3)


def test_biases_with_the_routers_weight_on_the_input(load: Load, folders: Folders) -> None:
    from vllm_nvfp4_moe.backends import vllm_kernels

    layer = load(folders["modelopt"])[LAYER].routed_experts
    layer.apply_router_weight_on_input = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_kernels.current_platform, "is_cpu", lambda: False)
        reason = vllm_kernels.VllmKernelsMethod.unsupported(layer)
    assert reason == "the router's weights are for the input of experts with biases"
