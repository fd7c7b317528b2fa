"""What doctor makes of a checkpoint: the shape of its experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantize.errors import QuantizeError
from vllm_nvfp4_moe.doctor.checkpoint import shape_of
from vllm_nvfp4_moe.doctor.shape import CLAMPED


def test_shape_of_a_checkpoint(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    for folder in (trained, *quantized.values()):
        shape, gates = shape_of(str(folder))
        assert (shape.experts, shape.top_k) == (
            config["num_local_experts"], config["num_experts_per_tok"],
        )  # fmt: skip
        assert (shape.hidden, shape.intermediate) == (
            config["hidden_size"], config["intermediate_size"],
        )  # fmt: skip
        assert (shape.gate, gates.layers, shape.router, shape.biased) == (
            CLAMPED,
            {},
            "sigmoid",
            False,
        )
    # Without its weights: config alone.
    shutil.copy(trained / "config.json", tmp_path)
    assert shape_of(str(tmp_path))[0].gate == CLAMPED


def test_what_is_no_checkpoint_with_experts(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="neither a folder nor a hub id"):
        shape_of("nowhere")  # and nobody asks the hub for it
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizeError, match="states no routed experts; leave") as told:
        shape_of(str(tmp_path))
    assert "--gate" not in str(told.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(QuantizeError, match="cannot be read") as told:
        shape_of(str(tmp_path))
    assert "\n" not in str(told.value)
