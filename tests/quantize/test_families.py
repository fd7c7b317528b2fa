"""Every ``*Experts`` class of Transformers: saved, quantized, and put back into its module.

The reference is Transformers' own module: with the dequantized weights put into its parameters, it
must compute what GEMM, identified gate, GEMM compute from the tensors that were written.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.find import find
from quantize.experts.gates import Gate, Gates, from_contract
from quantize.experts.identify import identify
from tests.quantize import checkpoints, families, families_page, reference
from tests.quantize.families import UNSUPPORTED

Weights = tuple[tuple[torch.Tensor, ...], torch.Tensor]
"""One expert's (gate, up) or (up,), each ``[intermediate, hidden]``, and down."""

SINGLE = re.compile("OpenAIPrivacyFilter|Beam|Inkling2|MuseSpark")
"""Classes whose code goes through float32."""

TOWER = re.compile(r"(?:^|\.)vision_encoder\.")
"""Dots3 Note's, with experts of the text model's class."""

CLASSES = families.classes()
SUPPORTED = sorted({family for name, family in CLASSES.items() if name not in UNSUPPORTED})


class Experts:
    """Transformers' module with one layer's experts: what its parameters mean, by its own word."""

    def __init__(self, path: str, module: Any) -> None:
        self.path = path
        self.module = module
        self.joined = getattr(module, "has_gate", True)
        self.transposed = getattr(module, "is_transposed", "Llama4" in type(module).__name__)
        self.concatenated = getattr(module, "is_concatenated", True)

    def stacked(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """The parameters of the first GEMM and of the second."""
        m = self.module
        if hasattr(m, "input_linear"):
            return m.input_linear.weight, m.output_linear.weight
        return (m.gate_up_proj if self.joined else m.up_proj), m.down_proj

    def views(self, expert: int) -> Weights:
        """Views of one expert's weights in the module."""
        if hasattr(self.module, "mlp"):  # DBRX
            w1, v1, w2 = (
                p.data.unflatten(0, (self.module.num_experts, -1))[expert]
                for p in (self.module.mlp.w1, self.module.mlp.v1, self.module.mlp.w2)
            )
            return (w1, v1), w2.T
        first, down = (p.data[expert] for p in self.stacked())
        if self.transposed:
            first, down = first.T, down.T
        if not self.joined:
            return (first,), down
        if self.concatenated:
            half = first.shape[0] // 2
            return (first[:half], first[half:]), down
        return (first[0::2], first[1::2]), down

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the module's own forward gives; ``x`` ``[tokens, hidden]``."""
        module = self.module
        if self.transposed and not hasattr(module, "is_transposed"):
            # Llama 4: all tokens to all experts, those not routed as zeros.
            dense = torch.zeros(len(x), module.num_experts, dtype=x.dtype).scatter_(1, ids, weights)
            everything = module(x.repeat(module.num_experts, 1)).unflatten(0, (-1, len(x)))
            return torch.einsum("eth,te->th", everything, dense)
        if hasattr(module, "input_linear"):
            # JetMoE: with our routing for its router's.
            order = ids.flatten().argsort(stable=True)
            sizes = ids.flatten().bincount(minlength=module.input_linear.num_experts).tolist()
            routed = (order, order // 2, weights.flatten()[order], sizes, None)
            module.router.forward = lambda _: routed
            return module(x[None])[0] - module.bias
        return module(x, ids, weights).reshape(x.shape)


def experts_of(model: torch.nn.Module) -> list[Experts]:
    """Its layers' routed experts, in the order of their names; tied ones once."""
    found: dict[int, Experts] = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        if name in CLASSES and name not in UNSUPPORTED and not TOWER.search(path):
            if name == "JetMoeParallelExperts":
                path, _, kind = path.rpartition(".")
                if path.endswith("experts") or kind != "input_linear":
                    continue  # attention
                module = model.get_submodule(path)
            found.setdefault(next(module.parameters()).data_ptr(), Experts(path, module))
    return sorted(found.values(), key=lambda e: natural(e.path))


def natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def written(folder: Path) -> dict[str, torch.Tensor]:
    """A quantized checkpoint's expert weights, float64, and biases: from bits, by the format."""
    raw = reference.read_folder(folder)
    out = {}
    for name, tensor in raw.items():
        if name.endswith(".weight") and f"{name}_scale" in raw:
            scale = float(raw[f"{name}_scale_2"].array().item())
            packed, bits = tensor.array(), raw[f"{name}_scale"].array()
            out[name] = torch.from_numpy(reference.dequantize(packed, bits, scale))
        elif re.search(r"\.experts\.\d+\.\w+\.bias$", name):
            out[name] = torch.from_numpy(np.array(tensor.array(), np.float64))
    return out


def plain(
    ours: list[dict[str, torch.Tensor]],
    gate: Gate,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """GEMM, gate, GEMM, one token and expert at a time, from the tensors of each expert."""
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            named = list(ours[expert].items())
            matrices = [t for name, t in named if name.endswith("weight")]
            biases = [t for name, t in named if name.endswith("bias")] or [None] * len(matrices)
            parts = [
                linear(x[token], w, b) for w, b in zip(matrices[:-1], biases[:-1], strict=True)
            ]
            own = linear(formula(gate, *parts), matrices[-1], biases[-1])
            if norm is not None:  # Muse Spark's
                own = own * (1 + norm)
                own = own / (own.square().mean() + 1e-8).sqrt()
            out[token] += weight * own
    return out


def formula(gate: Gate, *parts: torch.Tensor) -> torch.Tensor:
    """The identified form, written out anew."""
    first, up = parts[0], parts[-1]
    if gate.form == "situ":
        caps = gate.alpha * torch.tanh(first / gate.alpha), gate.limit * torch.tanh(up / gate.limit)
        return caps[0] * torch.sigmoid(first) * caps[1]
    limit = torch.inf if gate.limit is None else gate.limit
    if gate.form == "relu2":
        return up.clamp(min=0) ** 2
    if gate.form == "gelu_tanh":
        return torch.nn.functional.gelu(first, approximate="tanh") * up
    if gate.form == "swiglu_step":
        return (first * torch.sigmoid(first)).clamp(max=limit) * up.clamp(-limit, limit)
    assert gate.form in ("silu", "swiglu_oai")
    low = first.clamp(max=limit)
    return (up.clamp(-limit, limit) + gate.beta) * low * torch.sigmoid(gate.alpha * low)


@pytest.fixture(scope="module")
def model() -> Callable[[str], torch.nn.Module]:
    """``model(family)``: the tiny model; the last one is kept, since tests come by family."""
    kept: dict[str, torch.nn.Module] = {}

    def get(family: str) -> torch.nn.Module:
        if family not in kept:
            kept.clear()
            kept[family] = families.build(family)
        return kept[family]

    return get


LAYOUTS = {family: [*families.LAYOUTS, *families.PUBLISHED.get(family, {})] for family in SUPPORTED}


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in SUPPORTED for layout in LAYOUTS[family]],
)
def test_quantized_and_put_back(
    family: str, layout: str, model: Callable[[str], torch.nn.Module], tmp_path: Path
) -> None:
    original = model(family)
    source = families.save(original, family, layout, tmp_path / "source")
    talker = ("*", "talker*") if family == "qwen3_omni_moe" else ()
    checkpoints.convert(source, tmp_path / "target", include=talker)
    with Checkpoint(source) as checkpoint:
        groups = find(checkpoint, lambda _: bool(talker))
        left = set(checkpoint.tensors) - {name for group in groups for name in group.tensor_names}
    gates = identify(source)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert from_contract(config["nvfp4_moe"]) == gates.concatenated()

    # All else is there, bit for bit: towers, routers, shared experts.
    before, after = (reference.read_folder(tmp_path / name) for name in ("source", "target"))
    assert {name: after[name] for name in left} == {name: before[name] for name in left}
    tower = [name for name in left if "vision" in name and ".experts." in name]
    assert bool(tower) == (family == "dots3_note")  # of the text model's class

    tensors = written(tmp_path / "target")
    truth = experts_of(original)
    assert len(truth) == len(groups) > 0
    for theirs, group in zip(truth, groups, strict=True):
        again = Experts(theirs.path, copy.deepcopy(theirs.module).double())
        if (inner := getattr(again.module, "config", None)) is not None:
            inner._experts_implementation = "eager"
        ours = []
        for expert in range(group.num_experts):
            modules = [
                f"{group.prefix}.{group.first + expert}.{name}" for name in group.projections
            ]
            names = [f"{module}.{what}" for what in ("weight", "bias") for module in modules]
            ours.append({name: tensors.pop(name) for name in names if name in tensors})
            parts, down = again.views(expert)
            for view, module in zip((*parts, down), modules, strict=True):
                restored = ours[-1][f"{module}.weight"]
                assert 0.01 < (view - restored).norm() / view.norm() < 0.15, module
                view.copy_(restored)
        compare(again, ours, gates.of(group.prefix))
    assert not tensors


def compare(module: Experts, ours: list[dict[str, torch.Tensor]], gate: Gate) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = next(iter(ours[0].values())).shape[1]
    x = torch.randn(6, hidden, generator=generator).double()
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(6)])
    weights = torch.rand(6, 2, generator=generator).double()
    with torch.no_grad():
        theirs = module.run(x, ids, weights)
    norm = module.module.post_expert_norm.weight if gate.post_norm else None
    want = plain(ours, gate, x, ids, weights, norm)
    assert theirs.abs().max() > 1
    precision = 1e-6 if SINGLE.match(type(module.module).__name__) else 1e-12
    assert (want - theirs).abs().max() < precision * want.abs().max()


def test_every_class_is_accounted_for() -> None:
    """Tiny models hold every class that is not in the table of those that are not supported."""
    held = {
        type(module).__name__
        for family in set(CLASSES.values())
        for module in families.build(family).modules()
    }
    assert set(CLASSES) <= held
    assert set(UNSUPPORTED) <= set(CLASSES)
    assert len(CLASSES) > 60
    newer = set(families.NEWER)
    assert newer - set(CLASSES) == families.missing()


@pytest.mark.parametrize("family", ["nllb_moe", "switch_transformers"])
def test_what_is_not_supported_is_refused(family: str, tmp_path: Path) -> None:
    families.build(family).save_pretrained(tmp_path)
    with (
        Checkpoint(tmp_path) as checkpoint,
        pytest.raises(QuantizeError, match="no routed experts"),
    ):
        find(checkpoint)


def test_shared_experts_stay(model: Callable[[str], torch.nn.Module], tmp_path: Path) -> None:
    """InklingSharedExperts: stacked as routed ones are, but every token goes through them."""
    inkling = model("inkling")
    source = families.save(inkling, "inkling", "saved by Transformers", tmp_path / "source")
    checkpoints.convert(source, tmp_path / "target")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "target"))
    shared = [name for name in before if "shared_experts" in name]
    assert len(shared) == 2 * 3
    assert all(torch.equal(before[name], after[name]) for name in shared)


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_tiny_model_has_a_tower_where_the_family_has_one(
    family: str, model: Callable[[str], torch.nn.Module]
) -> None:
    """So that the test above is one of vision-language checkpoints too."""
    config: Any = families.config(family)
    towers = [c for c in ("vision_config", "audio_config") if getattr(config, c, None) is not None]
    if not towers:
        assert family not in ("glm4v_moe", "qwen3_vl_moe", "minimax_m3_vl", "llama4", "aria")
        return
    names = [name for name, _ in model(family).named_parameters()]
    assert any(re.search(r"vis|image|audio", name) for name in names)


def test_the_table_is_current() -> None:
    """If this fails: python -m tests.quantize.families_page"""
    assert families_page.FILE.read_text(encoding="utf-8") == families_page.page()


def test_gates_of_the_table() -> None:
    """Those that the project is about, by name."""
    wanted = {
        "minimax_m3_vl": Gates.uniform(Gate("swiglu_oai", 1.702, 1.0, 7.0)),
        "gpt_oss": Gates.uniform(Gate("swiglu_oai", 1.702, 1.0, 7.0, True)),
        "openai_privacy_filter": Gates.uniform(Gate("swiglu_oai", 1.702, 1.0, 7.0)),
        "glm5_next": Gates.uniform(Gate("swiglu_oai", limit=10.0)),
        "hy_v4": Gates.uniform(Gate("swiglu_oai", limit=10.0)),
        "deepseek_v4": Gates.uniform(Gate("swiglu_oai", limit=10.0)),
        "step3p7": Gates(Gate("silu"), {1: Gate("swiglu_step", limit=7.0)}),
        "nemotron_h": Gates.uniform(Gate("relu2")),
    }
    assert {family: families.gates(family) for family in wanted} == wanted
