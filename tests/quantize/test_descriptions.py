"""No description of the source's quantization is left in the output, wherever the source has it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from quantize.checkpoint.descriptions import are_plain, descriptions, without_descriptions
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize import checkpoints

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
STALE: list[tuple[str, Any]] = [
    ("quantization_config", FP8),
    ("compression_config", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    ("quant_config", {"w_bit": 4}),
    ("quantization", {"bits": 4, "group_size": 64}),
    ("expert_dtype", "fp4"),
    ("weight_block_size", [128, 128]),
]
KEYS = st.sampled_from(["text_config", "vision_config", "thinker_config", "a", "layers"])
INNOCENT = st.dictionaries(
    st.sampled_from(["hidden_size", "dtype", "quantization", "quantizer", "rope"]),
    st.sampled_from([1, "bfloat16", None, {"n_codebooks": 4}, ["x"]]),
    max_size=4,
)
CONFIGS = st.recursive(
    INNOCENT,
    lambda inner: (
        st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS, st.lists(inner, max_size=3), max_size=2)
    ),
    max_leaves=8,
)


def places(value: Any) -> list[dict[str, Any]]:
    """All dictionaries within ``value``."""
    if isinstance(value, list):
        return [place for item in value for place in places(item)]
    if not isinstance(value, dict):
        return []
    return [value] + [place for item in value.values() for place in places(item)]


@given(CONFIGS, st.data())
def test_wherever_they_are(config: dict[str, Any], data: st.DataObject) -> None:
    """What was there before the descriptions were put in is what is left of it."""
    assert without_descriptions(config) == config
    described = copy.deepcopy(config)
    for place in places(described):
        for key, value in data.draw(st.lists(st.sampled_from(STALE), max_size=2)):
            if key not in place:
                place[key] = copy.deepcopy(value)
    count = sum(k not in {"expert_dtype", "weight_block_size"} for k in _stale_keys(described))
    # Those within another description are part of it.
    assert len(list(descriptions(described))) == count
    assert without_descriptions(described) == config


def _stale_keys(value: Any) -> list[str]:
    if isinstance(value, list):
        return [key for item in value for key in _stale_keys(item)]
    if not isinstance(value, dict):
        return []
    found = []
    for key, item in value.items():
        if (key, item) in STALE:
            found.append(key)
        else:
            found += _stale_keys(item)
    return found


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "torch.float8_e4m3fn", "fp8", "int8", "uint4"])
def test_a_dtype_of_quantized_weights(dtype: str) -> None:
    config = {"dtype": dtype, "text_config": {"torch_dtype": dtype, "x": dtype}}
    expected = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": dtype}}
    assert without_descriptions(config) == expected
    assert without_descriptions({"dtype": "float16"}) == {"dtype": "float16"}


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_output_of_a_source_in_fp8(layout: str, tmp_path: Path) -> None:
    model = checkpoints.build("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in [n for n in tensors if ".experts." in n]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    config = model.config.to_dict() | {"compression_config": FP8, "expert_dtype": "fp8"}
    config |= {"extra": [{"vision_config": {"quantization_config": FP8}}]}
    source = checkpoints.save(tmp_path / "source", tensors, config)
    for name in ("hf_quant_config.json", "quantize_config.json", "recipe.yaml"):
        (source / name).write_text('{"quantization": {"quant_algo": "FP8"}}')
    checkpoints.convert(source, tmp_path / "target", layout)
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    assert "nvfp4" in json.dumps(written.pop("quantization_config")).lower()
    written.pop("nvfp4_moe")
    assert "fp8" not in json.dumps(written).lower()
    assert not (tmp_path / "target" / "recipe.yaml").exists()
    assert not (tmp_path / "target" / "quantize_config.json").exists()
    other = tmp_path / "target" / "hf_quant_config.json"
    assert "FP8" not in other.read_text() if layout == "modelopt" else not other.exists()


LEFT_OVER = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    FP8,
]


@pytest.mark.parametrize("block", LEFT_OVER)
@pytest.mark.parametrize("place", ["quantization_config", "text_config"])
def test_left_over_on_plain_tensors(block: dict[str, Any], place: str, tmp_path: Path) -> None:
    checkpoints.build("mixtral").save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    checkpoints.convert(tmp_path / "source", tmp_path / "plain")
    more = {place: block if place == "quantization_config" else {"quantization_config": block}}
    if place == "text_config":  # beside what else the model's own config has
        more = {"thinking": {"quantization_config": block}}
    file.write_text(json.dumps(config | more))
    with Checkpoint(tmp_path / "source") as checkpoint:
        (said,) = plan(checkpoint, Options()).notes
        assert "quantization_config is left over: no tensor is quantized" in said
    checkpoints.convert(tmp_path / "source", tmp_path / "target")
    plain, ours = (checkpoints.contents(tmp_path / name) for name in ("plain", "target"))
    assert ours["model.safetensors"] == plain["model.safetensors"]
    assert json.loads(ours["config.json"]) == json.loads(plain["config.json"]) | {
        k: {} for k in more if k == "thinking"
    }


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", "I32", (4, 32)),
        ("model.layers.0.self_attn.q_proj.weight", "U8", (512, 1)),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "F32", (8,)),
        ("model.layers.0.self_attn.q_proj.SCB", "F32", (32,)),
        ("model.layers.0.self_attn.q_proj.weight_scale", "BF16", (32, 1)),
    ],
)
def test_not_left_over(name: str, dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """One quantized linear, and the description is needed."""
    plain = {
        "a.weight": TensorInfo("a.weight", "BF16", (2, 2)),
        "position_ids": TensorInfo("position_ids", "I64", (1, 8)),
    }
    assert are_plain(plain)
    assert not are_plain(plain | {name: TensorInfo(name, dtype, shape)})
    checkpoints.build("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    torch_dtype = {"I32": torch.int32, "U8": torch.uint8, "F32": torch.float32}
    tensors[name] = torch.zeros(shape, dtype=torch_dtype.get(dtype, torch.bfloat16))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    source = checkpoints.save(tmp_path, tensors, config)
    with (
        Checkpoint(source) as checkpoint,
        pytest.raises(QuantizeError, match=r"already quantized.*bitsandbytes"),
    ):
        plan(checkpoint, Options())
