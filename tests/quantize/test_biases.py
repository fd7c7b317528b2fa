"""Biases of experts: split as their weights are, kept bit for bit, and compared by ``verify``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.run.report_files import REPORT_DATA
from tests.quantize import checkpoints
from tests.quantize.test_calibration_proof import gpt_oss_mxfp4
from tests.quantize.test_cli import run

EXPERTS = "model.layers.{}.mlp.experts"
Folders = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["bf16", "mxfp4"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-OSS, whose biases are random: gate's and up's in alternate columns of one tensor."""
    folder = tmp_path_factory.mktemp("source") / request.param
    if request.param == "mxfp4":
        gpt_oss_mxfp4(folder, 64)
    else:
        model = checkpoints.random_model(checkpoints.gpt_oss(num_local_experts=3))
        config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        checkpoints.save(folder, dict(model.state_dict()), config)
    change(folder, lambda t: [b.normal_() for n, b in t.items() if n.endswith("_proj_bias")])
    return folder


def change(folder: Path, apply: Callable[[Tensors], object]) -> None:
    """Change the tensors of a folder of one file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    apply(tensors)
    save_file(tensors, file, {"format": "pt"})


def split(tensors: Tensors, layer: int) -> Tensors:
    """What is to be written, by name: the even columns are gate's, the odd ones up's."""
    prefix, found = EXPERTS.format(layer), {}
    both, down = (tensors[f"{prefix}.{name}_proj_bias"] for name in ("gate_up", "down"))
    for expert, (columns, row) in enumerate(zip(both, down, strict=True)):
        pairs = columns.reshape(-1, 2)
        for name, bias in (("gate", pairs[:, 0]), ("up", pairs[:, 1]), ("down", row)):
            found[f"{prefix}.{expert}.{name}_proj.bias"] = bias
    return found


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_biases_are_split_and_verified(source: Path, tmp_path: Path, layout: str) -> None:
    checkpoints.convert(source, tmp_path / "out", layout)
    original, written = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    want = split(original, 0) | split(original, 1)
    assert {name for name in written if "experts" in name and "bias" in name} == set(want)
    for name, bias in want.items():
        assert written[name].dtype == torch.bfloat16
        assert torch.equal(written[name], bias), name
    assert run("verify", source, tmp_path / "out").exit_code == 0


def test_an_excluded_layer_keeps_its_stacks(source: Path, tmp_path: Path) -> None:
    checkpoints.convert(source, tmp_path / "out", exclude=("*layers.1.*",))
    original, written = (load_file(f / "model.safetensors") for f in (source, tmp_path / "out"))
    want = split(original, 0)
    for name in ("gate_up", "down"):
        stack = f"{EXPERTS.format(1)}.{name}_proj_bias"
        want[stack] = original[stack]
    assert {name for name in written if "experts" in name and "bias" in name} == set(want)
    assert all(torch.equal(written[name], bias) for name, bias in want.items())
    assert run("verify", source, tmp_path / "out").exit_code == 0


def flip_a_bit(tensors: Tensors, name: str) -> None:
    tensors[name].view(torch.uint8)[5] ^= 1


def swap_with_up(tensors: Tensors, name: str) -> None:
    other = name.replace("gate_proj", "up_proj")
    tensors[name], tensors[other] = tensors[other], tensors[name]


def widen(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].float()


@pytest.mark.parametrize("damage", [flip_a_bit, swap_with_up, widen, Tensors.pop])
def test_verify_finds_a_bias_that_differs(
    source: Path, tmp_path: Path, damage: Callable[[Tensors, str], object]
) -> None:
    checkpoints.convert(source, tmp_path / "out")
    name = f"{EXPERTS.format(1)}.2.gate_proj.bias"
    change(tmp_path / "out", lambda tensors: damage(tensors, name))
    result = run("verify", source, tmp_path / "out")
    assert result.exit_code == 1
    assert name in "".join(x for x in result.stderr.splitlines() if x.startswith("problem:"))


def test_biases_of_another_dtype(source: Path, tmp_path: Path) -> None:
    """They keep it, whatever the weights have."""
    folder = shutil.copytree(source, tmp_path / "source")
    wide = f"{EXPERTS.format(0)}.down_proj_bias"
    change(folder, lambda t: t.update({wide: t[wide].float() + 1e-5}))
    checkpoints.convert(folder, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, bias in split(load_file(folder / "model.safetensors"), 0).items():
        assert written[name].dtype == bias.dtype and torch.equal(written[name], bias), name


def test_the_report_counts_them(source: Path, tmp_path: Path) -> None:
    """Both before and after, so that all else is what it was."""
    checkpoints.convert(source, tmp_path / "out")
    report = json.loads((tmp_path / "out" / REPORT_DATA).read_text())
    for when, folder in (("bytes_before", source), ("bytes_after", tmp_path / "out")):
        tensors = load_file(folder / "model.safetensors")
        for layer in report["layers"]:
            parts = [t for name, t in tensors.items() if name.startswith(layer["prefix"])]
            assert layer[when] == sum(t.nbytes for t in parts), when
