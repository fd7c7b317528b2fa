"""``nvfp4-moe evaluate``: its figures are those of two whole models in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.evaluate import Result, evaluate
from tests.plugin.reference import m3_gate
from tests.quantize import evaluated, families
from tests.quantize.checkpoints import convert
from tests.quantize.test_calibration_forward import rows_of

ROWS = rows_of(3, 16)
DENSE_FIRST: dict[str, dict[str, Any]] = {
    "minimax_m3_vl": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "qwen3_moe": {},
}
GATES = {"minimax_m3_vl": m3_gate}


def saved(family: str, folder: Path, **more: Any) -> Path:
    """A tiny random model under its modules' names."""
    model = families.build(family, **DENSE_FIRST.get(family, {}) | more)
    return families.save(model, family, families.LAYOUTS[1], folder)


def run(source: Path, target: Path, rows: torch.Tensor = ROWS, **more: Any) -> Result:
    with Checkpoint(source) as first, Checkpoint(target) as second:
        return evaluate(first, second, rows, **{"dtype": torch.float64, **more})


def check(found: Result, truth: evaluated.Truth, near: float = 1e-6) -> None:
    """Everything that is found, to ``near`` of itself."""
    figures = found.figures
    assert figures.tokens == ROWS.shape[0] * (ROWS.shape[1] - 1)
    assert figures.before == pytest.approx(truth.before, rel=near)
    assert figures.after == pytest.approx(truth.after, rel=near)
    assert figures.change == pytest.approx(100 * (truth.after / truth.before - 1), abs=1e-4)
    assert figures.kl == pytest.approx(truth.kl, rel=10 * near)  # it is a square
    assert figures.kl_error == pytest.approx(truth.kl_error, rel=10 * near)
    assert figures.top1 == truth.top1
    depth = [(each.error, each.median_token) for each in found.depth]
    for got, want in zip(depth, truth.depth, strict=True):
        assert got == pytest.approx(want, rel=10 * near, abs=1e-12)


CASES = [
    ("minimax_m3_vl", "modelopt", None),
    ("minimax_m3_vl", "compressed-tensors", "mxfp8"),
    ("qwen3_moe", "compressed-tensors", None),
    ("qwen3_moe", "modelopt", "fp8"),
    ("deepseek_v3", "modelopt", None),
]


@pytest.mark.parametrize(("family", "layout", "base"), CASES)
def test_as_transformers(family: str, layout: str, base: str | None, tmp_path: Path) -> None:
    more = {"hidden_size": 128, "head_dim": 64} if base == "fp8" else {}
    source, target = saved(family, tmp_path / "source", **more), tmp_path / "target"
    convert(source, target, layout, base=base)
    found = run(source, target)
    assert found.activations == "bf16"
    gate = GATES.get(family, evaluated.silu_gate)
    model = evaluated.replaced(source, target, gate)
    assert bool(evaluated.Stored(target).eight_bits()) == (base is not None)
    truth = evaluated.compare(evaluated.model_of(source), model, ROWS)
    assert truth.kl > 1e-3
    check(found, truth)


def scaled(folder: Path) -> None:
    """Give each projection of each expert another input scale, that of gate not that of up."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    draw = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(("input_scale", "input_global_scale")):
            scale = 10 ** (torch.rand((), generator=draw) * 1.5 - 3.5)
            own = scale if name.endswith("input_scale") else 1 / scale
            tensors[name] = own.reshape(tensor.shape).to(tensor.dtype)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("activations", [None, "fp8", "bf16"])
@pytest.mark.parametrize(
    ("family", "layout"), [("minimax_m3_vl", "modelopt"), ("qwen3_moe", "compressed-tensors")]
)
def test_rounded_activations(
    family: str, layout: str, activations: str | None, tmp_path: Path
) -> None:
    """By default what the target says: it has input scales."""
    source, target = saved(family, tmp_path / "source"), tmp_path / "target"
    convert(source, target, layout, activations=True)
    scaled(target)
    found = run(source, target, activations=activations)
    assert found.activations == (activations or "nvfp4")
    gate, before = GATES.get(family, evaluated.silu_gate), evaluated.model_of(source)
    model = evaluated.replaced(source, target, gate, found.activations)
    truth = evaluated.compare(before, model, ROWS)
    # What the rounding is done in is float32.
    check(found, truth, 1e-6 if found.activations == "bf16" else 1e-5)
    if found.activations != "bf16":
        alone = evaluated.compare(before, evaluated.replaced(source, target, gate), ROWS)
        assert truth.depth[-1][0] / alone.depth[-1][0] > 1.005  # it is seen
