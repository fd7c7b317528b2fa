"""The accuracy bench on tiny models, and on trained ones, whose figures are known."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks import input_scales, modelopt_on_cpu, peers
from benchmarks.accuracy import RECIPES, Bench, Figures, Row, table
from examples.perplexity import model_perplexity
from quantize.layouts import LAYOUTS
from tests.benchmarks import tiny
from tests.gpu.reference import Stored
from tests.quantize.plain import plainly
from tests.trained import NANO, OWN


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("accuracy") / request.param
    return Bench(tiny.save(request.param, folder), rows=6, prompts=8, tokens=6)


def dequantized(bench: Bench, folder: Path) -> Any:
    """The model with its parameters overwritten by what the files mean, by another reader."""
    tensors = load_file(folder / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(bench.source, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if not name.endswith("mlp.experts"):
            continue
        for expert in range(4):
            parts = []
            for projection in ("gate_proj", "up_proj", "down_proj"):
                module_name = f"{name}.{expert}.{projection}"
                codes, scale, global_scale, _ = (
                    tensors[f"{module_name}.{suffix}"] for suffix in LAYOUTS["modelopt"].suffixes
                )
                stored = Stored(codes[None], scale[None], global_scale[None])
                parts.append(stored.weight(0, torch.float32))
            module.gate_up_proj.data[expert] = torch.cat(parts[:2])
            module.down_proj.data[expert] = parts[2]
    return model


@torch.inference_mode()
def divergence(bench: Bench, model: Any) -> tuple[float, float]:
    """KL and top-1 agreement, a row at a time and in float64."""
    reference = AutoModelForCausalLM.from_pretrained(bench.source, dtype=torch.float32).eval()
    kl, same = [], []
    for row in bench.rows:
        ids = torch.tensor([row[:-1]])
        p, q = (m(input_ids=ids).logits[0].double() for m in (reference, model))
        p, q = p.softmax(-1), q.softmax(-1)
        kl.append((p * (p / q).log()).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(kl).mean().item(), torch.cat(same).double().mean().item()


def test_the_unquantized_model_is_its_own_reference(bench: Bench) -> None:
    row = bench.unquantized()
    assert row.weights is not None and row.activations is not None
    assert row.weights.kl == pytest.approx(0, abs=1e-9)
    assert row.weights.top1 == 1
    assert row.weights.agreement == 6
    assert row.weights.perplexity == pytest.approx(model_perplexity(bench.model, bench.rows))
    assert row.activations.kl > 1e-4


def test_figures_are_those_of_a_model_with_the_dequantized_weights(
    bench: Bench, tmp_path: Path
) -> None:
    row = bench.ours("max", tmp_path / "nvfp4")
    model = dequantized(bench, tmp_path / "nvfp4")
    kl, same = divergence(bench, model)
    assert row.label == "ours, max"
    assert row.weights is not None and row.activations is not None
    assert row.weights.kl == pytest.approx(kl, rel=1e-3)
    assert row.weights.top1 == pytest.approx(same, abs=2e-3)
    assert row.weights.perplexity == pytest.approx(model_perplexity(model, bench.rows), rel=1e-5)
    assert 0 < row.weights.error < row.weights.kl
    assert row.activations.kl > row.weights.kl
    assert bench.unquantized().weights == bench.unquantized().weights  # nothing of it stayed


def test_every_rule_of_ours_has_a_recipe(bench: Bench) -> None:
    assert {recipe(bench).scales for recipe in RECIPES.values()} >= {"max", "mse"}


def test_calibration_text_is_not_the_held_out_text(bench: Bench) -> None:
    held_out = {tuple(row) for row in bench.rows}
    assert not held_out & {tuple(row) for row in bench.calibration(200)}


def test_what_cannot_be_had_says_why(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for recipe in peers.RECIPES:
        row = bench.modelopt(recipe, [])
        assert row.weights is None and row.activations is None
        assert row.why == f"ModelOpt is not installed: pip install {peers.MODELOPT}"
    row = bench.folder("source", bench.source)
    assert row.weights is None and "not NVFP4" in row.why


def test_modelopts_kernels_on_a_cpu_are_this_packages_max_rule() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    expected = plainly([weight])[0].dequantize()
    amax = weight.unflatten(-1, (-1, 16)).abs().amax(-1)
    assert torch.allclose(modelopt_on_cpu.dynamic(weight, 16, None, 4, 2, 8, 4), expected)
    assert torch.allclose(modelopt_on_cpu.static(weight, amax), expected)


def test_the_table() -> None:
    figures = Figures(0.00938, 0.00012, 6.5, 0.954)
    text = table(
        [Row("a", figures, figures._replace(kl=0.01819)), Row("b", figures, why="no scales")], None
    )
    head, _, first, second, _, why = text.splitlines()
    assert head.count("|") == first.count("|") == second.count("|") == 8
    assert "0.00938 ± 0.00012 | 6.5000 | 95.40% | 0.01819" in first
    assert second.endswith("| – | – | – |")  # noqa: RUF001
    assert why == "- b: no scales"
    both = table([Row("a", figures._replace(agreement=12.34, closed=0.5))], 32)
    assert "| 12.3 | 50.0% |" in both and "same text, of 32" in both


KNOWN = {
    # 1.7e-4 and 4.2e-4, over 12 rows 2.1e-4 and 4.5e-4, and something else where another Python or
    # processor trains it. After so little training its experts do less than m3-nano's.
    OWN: (0.5e-4, 6e-4),
    # 0.00895 and 0.0178 over 48 rows; ModelOpt's, on other rows: 0.00938 and 0.01819.
    NANO: (0.006, 0.015),
}
"""Of each trained model: bounds of the mean KL divergence, in nats, of weights alone."""


def test_trained_models_known_figures(
    each_trained: Path, quantized_of: Callable[[Path], dict[str, Path]], request: Any
) -> None:
    low, high = KNOWN[request.node.callspec.params["each_trained"]]
    bench = Bench(each_trained, rows=3)
    folders = quantized_of(each_trained)
    rows = [bench.folder(layout, folder) for layout, folder in folders.items()]
    weights, activations = rows[0].weights, rows[0].activations
    assert weights is not None and activations is not None
    assert low < weights.kl < high
    assert 1.5 * weights.kl < activations.kl < 3.5 * weights.kl
    for one, other in ((rows[1].weights, weights), (rows[1].activations, activations)):
        assert one is not None and one.kl == pytest.approx(other.kl, rel=1e-3)  # another layout


def test_the_table_of_input_scales(bench: Bench, tmp_path: Path) -> None:
    """The rules in their order; without rounded inputs it is the bench's own figure."""
    rows = torch.tensor(bench.calibration(3))
    found = [line.split("|")[1:4] for line in input_scales.lines(bench, rows, tmp_path)][2:]
    cells = [tuple(cell.strip() for cell in row) for row in found]
    by_rule = ["no room", "max", "headroom"]
    assert [cell[:2] for cell in cells] == [
        ("-", "bf16"),
        ("-", "fp8"),
        ("1.0", "shared"),
        *((rule, kernels) for kernels in ("shared", "expert") for rule in by_rule),
        ("max", "four-six"),
        ("-", "token"),
        ("-", "token-four-six"),
    ]
    kl = {cell[:2]: float(cell[2].split()[0]) for cell in cells}
    weights = bench.ours("mse", tmp_path / "mse").weights
    assert weights is not None
    assert kl["-", "bf16"] == pytest.approx(weights.kl, abs=1e-5)
    assert min(kl, key=lambda cell: kl[cell]) == ("-", "bf16")
