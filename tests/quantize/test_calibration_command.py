"""``--calibrate`` as a command: both layouts, what it refuses, and text in every form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quantize.calibration.samples import load_samples
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
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
        (("--input-scales", "few.txt", "--rounding", "gptq"), "--rounding needs --calibrate"),
        (("--input-scales", "few.txt"), "tokens, 32 rows of 2048 need 65536; give more text"),
        (("--input-scales", "few.txt", "--calibrate", "few.txt"), "leave --input-scales out"),
        (("--input-scales", "few.txt", "--activations", "bf16"), "leave one out"),
        (("--input-scales", "few.txt", "--all-linears"), "of experts, not of --all-linears"),
        (("--calibration-rows", "8"), "--calibration-rows needs --calibrate"),
        (("--calibrate", "few.txt"), "tokens, 128 rows of 2048 need 262144; give more text"),
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


# -- text ------------------------------------------------------------------------------------------


def test_text_in_every_form(trained: Path, tmp_path: Path) -> None:
    documents = [f"def f{n}(x):\n    return x + {n}\n" * 20 for n in range(40)]
    (tmp_path / "folder").mkdir()
    for number, document in enumerate(documents):
        (tmp_path / "folder" / f"{number:02}.txt").write_text(document)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, documents)))
    from_lines = load_samples(tmp_path / "a.jsonl", trained, 4, 64)
    assert from_lines.shape == (4, 64)
    assert torch.equal(from_lines, load_samples(tmp_path / "b.jsonl", trained, 4, 64))
    assert torch.equal(from_lines, load_samples(tmp_path / "folder", trained, 4, 64))
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert from_lines[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(from_lines[0, 1:20]) in documents[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("few.txt", "x = 1\n", r"few.txt: \d+ tokens, 4 rows of 64 need 256"),
        ("broken.jsonl", '"x"\n{', "broken.jsonl, line 2: cannot be read as JSON"),
        ("deep.jsonl", "[" * 200000, "deep.jsonl, line 1: cannot be read as JSON"),
        ("fields.jsonl", '{"id": 1}', "fields.jsonl, line 1: has none of the fields text"),
        ("binary.txt", "\udcff", "binary.txt: cannot be read as text"),
        ("chat.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "chat template"),
    ],
)
def test_text_that_is_none(
    trained: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    file = tmp_path / name
    file.write_text(content, errors="surrogateescape")
    for part in ("tokenizer.json", "tokenizer_config.json"):  # and no chat template
        shutil.copyfile(trained / part, tmp_path / part)
    with pytest.raises(QuantizeError, match=message):
        load_samples(file, tmp_path, 4, 64)


def test_a_missing_text_and_an_empty_folder(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"nowhere.txt: cannot be read"):
        load_samples(tmp_path / "nowhere.txt", trained, 1, 16)
    with pytest.raises(QuantizeError, match=r"holds no \.jsonl"):
        load_samples(tmp_path, trained, 1, 16)
