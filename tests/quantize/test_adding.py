"""Adding something is one file and one registration: tried here with one thing of each kind.

``tests/quantize/toys.py`` is the files; each test makes the one registration, and then runs the
whole way from checkpoint to checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantize.calibration.samples import digest_of
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.sources import FORMATS
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.experts.gates import FORMS, Gate
from quantize.experts.identify import identify
from quantize.layouts import LAYOUTS
from quantize.nvfp4.input_scales import INPUT_RULES
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.kernels.kernel import quantize_weights
from quantize.nvfp4.kernels.reference import ReferenceKernel
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.scales import RULES
from quantize.registry import Registry
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from quantize.verify import verify
from tests.quantize import checkpoints, toys
from tests.quantize.checkpoints import convert

Register = Callable[[Registry[Any], str, str], None]
Folders = Callable[[str], Path]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Does to a registry what one more line in its file would."""

    def add(registry: Registry[Any], name: str, attribute: str) -> None:
        monkeypatch.setitem(registry._places, name, f"tests.quantize.toys:{attribute}")

    return add


def problems(source: Path, target: Path) -> list[str]:
    with Checkpoint(source) as original, Checkpoint(target, decode=False) as quantized:
        return verify(original, quantized).problems


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_scale_rule_that_chooses_the_global_scale(
    register: Register, saved: Folders, tmp_path: Path
) -> None:
    register(RULES, "roomy", "ROOMY")
    source, out = saved("qwen3_moe"), tmp_path / "out"
    convert(source, out, scales="roomy")
    assert not problems(source, out)
    before, after = weights_of(source), weights_of(out)
    scales = [name for name in after if name.endswith("gate_proj.weight_scale_2")]
    assert scales
    for name in scales:
        expert = name.removesuffix(".gate_proj.weight_scale_2")
        pair = [f"{expert}.{projection}.weight" for projection in ("gate_proj", "up_proj")]
        amax = max(before[weight].abs().max().item() for weight in pair)
        assert after[name].item() == pytest.approx(amax / (6 * 256), rel=1e-6)
        # Where the max rule would have 448.
        assert max(after[f"{weight}_scale"].float().max().item() for weight in pair) == 256


def test_a_scale_rule_that_searches_is_fast_by_itself(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(RULES, "neighbours", "NEIGHBOURS")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    [slow] = quantize_weights([weight], "neighbours", ReferenceKernel())
    assert slow.noise < quantize_weights([weight], "max", ReferenceKernel())[0].noise

    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the fast kernel knows from the offsets what to try")

    monkeypatch.setattr(toys, "NEIGHBOURS", replace(toys.NEIGHBOURS, block_scale=refuse))
    [fast] = quantize_weights([weight], "neighbours", for_device(torch.device("cpu")))
    assert torch.equal(fast.weight.codes, slow.weight.codes)
    assert torch.equal(fast.counts, slow.counts)


def test_a_layout_of_three_tensors(register: Register, saved: Folders, tmp_path: Path) -> None:
    register(LAYOUTS, "weight-only", "WEIGHT_ONLY")
    source, out, stock = saved("qwen3_moe"), tmp_path / "out", tmp_path / "stock"
    convert(source, out, layout="weight-only")
    convert(source, stock)
    assert not problems(source, out)
    ours, theirs = weights_of(out), weights_of(stock)
    codes = [name.removesuffix(".q") for name in ours if name.endswith(".q")]
    assert len(codes) == sum(name.endswith("weight_scale_2") for name in theirs)
    for module in codes:
        for mine, name in (("q", "weight"), ("s", "weight_scale"), ("g", "weight_scale_2")):
            a, b = ours[f"{module}.{mine}"], theirs[f"{module}.{name}"]
            assert bits(a) == bits(b)
    assert "input_scale" not in "".join(ours)
    assert json.loads((out / "toy.json").read_text())["ignore"]


@pytest.mark.parametrize("layout", ["modelopt", "weight-only"])
def test_a_rounding(layout: str, register: Register, saved: Folders, tmp_path: Path) -> None:
    register(METHODS, "nearest", "NEAREST")
    register(LAYOUTS, "weight-only", "WEIGHT_ONLY")
    source = saved("qwen3_moe")
    tokens = torch.randint(1, 16, (4, 64), generator=torch.Generator().manual_seed(0))
    calibration = Calibration("text", 4, 64, digest_of(tokens), "nearest", every_expert=True)
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, Options(layout=layout, activations=True, calibration=calibration))
        execute(checkpoint, steps, tmp_path / "calibrated", samples=tokens)
    convert(source, tmp_path / "plain", layout=layout, scales="max", activations=True)
    ours, theirs = weights_of(tmp_path / "calibrated"), weights_of(tmp_path / "plain")
    assert list(ours) == list(theirs)
    inputs = [name for name in ours if name.endswith("input_scale")]
    assert bool(inputs) == (layout == "modelopt")
    for name, tensor in ours.items():  # it rounds as the max rule does, whatever the inputs are
        assert (bits(tensor) == bits(theirs[name])) == (name not in inputs), name


def test_an_input_scale_rule(register: Register, saved: Folders, tmp_path: Path) -> None:
    register(INPUT_RULES, "one", "one_for_the_largest")
    source = saved("qwen3_moe")
    tokens = torch.randint(1, 16, (4, 64), generator=torch.Generator().manual_seed(0))
    for rule in ("one", "max"):
        settings = Calibration("text", 4, 64, digest_of(tokens), None, input_scale_rule=rule)
        with Checkpoint(source) as checkpoint:
            steps = plan(checkpoint, Options(activations=True, calibration=settings))
            execute(checkpoint, steps, tmp_path / rule, samples=tokens)
        assert not problems(source, tmp_path / rule)
    ours, theirs = weights_of(tmp_path / "one"), weights_of(tmp_path / "max")
    inputs = [name for name in ours if name.endswith("input_scale")]
    assert inputs
    for name, tensor in ours.items():
        if name in inputs:  # where the largest block scale is half of 448
            assert tensor.item() == pytest.approx(224 * theirs[name].item(), rel=1e-5)
        else:
            assert bits(tensor) == bits(theirs[name]), name


def test_a_source_format(register: Register, saved: Folders, tmp_path: Path) -> None:
    before = weights_of(saved("qwen3_moe"))
    config = json.loads((saved("qwen3_moe") / "config.json").read_text())
    plain, stored = dict(before), dict(before)
    for name in [n for n in before if ".experts." in n]:
        scale = before[name].float().abs().amax(1, keepdim=True) / 127
        codes = (before[name].float() / scale).round().to(torch.int8)
        stored[name], stored[f"{name}_scale"] = codes, scale
        plain[name] = codes.float() * scale
    quantized = config | {"quantization_config": {"quant_method": "toy_int8"}}
    sources = {
        "int8": checkpoints.save(tmp_path / "int8", stored, quantized),
        "float": checkpoints.save(tmp_path / "float", plain, config),
    }
    with pytest.raises(QuantizeError, match="toy_int8"):
        convert(sources["int8"], tmp_path / "refused")
    register(FORMATS, "int8-rows", "INT8_ROWS")
    for name, source in sources.items():
        convert(source, tmp_path / f"out-{name}")
    assert not problems(sources["int8"], tmp_path / "out-int8")
    ours, theirs = weights_of(tmp_path / "out-int8"), weights_of(tmp_path / "out-float")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert bits(tensor) == bits(theirs[name]), name
    lonely = {name: t for name, t in stored.items() if not name.endswith("0.up_proj.weight_scale")}
    checkpoints.save(tmp_path / "lonely", lonely, quantized)
    with pytest.raises(QuantizeError, match=r"up_proj\.weight is INT8 without a scale"):
        convert(tmp_path / "lonely", tmp_path / "never")


def test_a_gate(register: Register, tmp_path: Path) -> None:
    model = checkpoints.build("qwen3_moe", hidden_act="mish")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(QuantizeError, match="its gate is none of"):
        identify(tmp_path / "source")
    register(FORMS, "mish", "Mish")
    assert identify(tmp_path / "source").default == Gate("mish")
    convert(tmp_path / "source", tmp_path / "out")
    contract = json.loads((tmp_path / "out" / "config.json").read_text())["nvfp4_moe"]
    assert contract["gate"]["form"] == "mish"
