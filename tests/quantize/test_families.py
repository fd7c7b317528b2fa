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
from tests.quantize.put_back import Experts, experts_of, formula, written

SINGLE = re.compile("OpenAIPrivacyFilter|Beam|Inkling2|MuseSpark")
"""Classes whose code goes through float32."""

CLASSES = families.classes()
SUPPORTED = sorted({family for name, family in CLASSES.items() if name not in UNSUPPORTED})


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
