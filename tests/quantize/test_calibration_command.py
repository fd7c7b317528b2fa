"""``--calibrate`` as a command: both layouts, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quantize.checkpoint.reader import Checkpoint
from quantize.verify import verify
from tests.quantize import reference
from tests.quantize.test_cli import refusal, run

pytestmark = pytest.mark.usefixtures("one_thread")


def verified(source: Path, target: Path) -> list[str]:
    with Checkpoint(source) as original, Checkpoint(target, decode=False) as quantized:
        return verify(original, quantized).problems


@pytest.fixture
def qwen(tmp_path: Path, trained: Path) -> Path:
    """A random Qwen3-MoE of one layer, with SiLU experts and the trained model's tokenizer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=48, max_position_embeddings=512,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "qwen")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / name, tmp_path / "qwen" / name)
    return tmp_path / "qwen"


def test_the_command(qwen: Path, text: Path, tmp_path: Path) -> None:
    """Both layouts hold the same numbers; what is needed is said before, layers while it runs."""
    size = ("--calibration-rows", "8", "--calibration-length", "64")
    weights = {}
    for layout in ("modelopt", "compressed-tensors"):
        result = run("quantize", qwen, tmp_path / layout, "--calibrate", text, *size,
                     "--layout", layout)  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "Calibration: about" in result.stderr
        assert "of memory" in result.stderr
        assert verified(qwen, tmp_path / layout) == []
        tensors = reference.read_folder(tmp_path / layout)
        base = "model.layers.0.mlp.experts.1"
        weights[layout] = [
            reference.weight(tensors, f"{base}.{name}")
            for name in ("gate_proj", "up_proj", "down_proj")
        ]
        inputs = {
            "modelopt": lambda t, b: float(t[f"{b}.up_proj.input_scale"].array().item()),
            "compressed-tensors": lambda t, b: (
                1 / float(t[f"{b}.up_proj.input_global_scale"].array().item())
            ),
        }
        weights[layout].append(np.float32(inputs[layout](tensors, base)))
    for one, other in zip(*weights.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert 0 < weights["modelopt"][3] < 0.1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (("--calibrate", "nowhere.txt"), "nowhere.txt: there is no such file or folder"),
        (("--rounding", "gptq"), "--rounding needs --calibrate"),
        (("--input-scale-rule", "headroom"), "--input-scale-rule needs --calibrate"),
        (
            ("--calibrate", "few.txt", "--activations", "bf16", "--input-scale-rule", "headroom"),
            "--activations bf16 leaves no use for --input-scale-rule",
        ),
        (("--input-scales", "few.txt", "--rounding", "gptq"), "--rounding needs --calibrate"),
        (("--input-scales", "few.txt"), "tokens, and fewer than 32 say nothing"),
        (("--input-scales", "few.txt", "--calibrate", "few.txt"), "leave --input-scales out"),
        (("--input-scales", "few.txt", "--activations", "bf16"), "leave one out"),
        (("--input-scales", "few.txt", "--all-linears"), "of experts, not of --all-linears"),
        (("--calibration-rows", "8"), "--calibration-rows needs --calibrate"),
        (("--calibrate", "few.txt"), "tokens, and fewer than 32 say nothing"),
        (("--calibrate", "few.txt", "--calibrate", "x.txt"), "x.txt: there is no such file"),
    ],
)
def test_what_the_command_refuses(
    qwen: Path, tmp_path: Path, what: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("x = 1\n")
    code = 1 if "tokens, " in message or "no such file" in message else 2
    assert message in refusal("quantize", qwen, tmp_path / "out", *what, code=code)
    assert not (tmp_path / "out").exists()
