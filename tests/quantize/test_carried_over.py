"""What a source has that is odd but harmless: it is carried over, and said where it may matter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.run.plan import plan
from quantize.verify import verify
from tests.quantize.checkpoints import build, convert, save, write_index
from tests.quantize.reference import INDEX

FP8 = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


def model(**config: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    built = build("qwen3_moe", moe_intermediate_size=48, **config)
    return dict(built.state_dict()), built.config.to_dict() | {
        "architectures": ["Qwen3MoeForCausalLM"]
    }


def problems(source: Path, target: Path) -> list[str]:
    with Checkpoint(source) as ours, Checkpoint(target, decode=False) as theirs:
        return verify(ours, theirs).problems


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_without_a_scale_is_copied_and_said(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, config = model()
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"]
    for name in names:
        tensors[name] = tensors[name].to(dtype)
    source = save(tmp_path / "source", tensors, config)
    with Checkpoint(source) as checkpoint:
        [note] = plan(checkpoint).notes
    assert note.startswith(f"Warning: model.safetensors: {names[0]} and 1 more are FP8 without")
    convert(source, tmp_path / "target")
    written = load_file(tmp_path / "target" / "model.safetensors")
    for name in names:
        assert written[name].dtype == dtype
        assert torch.equal(written[name].view(torch.uint8), tensors[name].view(torch.uint8))
    ignored = json.loads((tmp_path / "target" / "config.json").read_text())
    assert {n.removesuffix(".weight") for n in names} < set(
        ignored["quantization_config"]["ignore"]
    )
    assert problems(source, tmp_path / "target") == []


@pytest.mark.parametrize("dtype", FP8)
def test_experts_in_fp8_without_a_scale_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, config = model()
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name].to(dtype)
    source = save(tmp_path / "source", tensors, config)
    message = rf"^model.safetensors: {name} is {FP8[dtype]}, but has no scale that is known"
    with Checkpoint(source) as checkpoint, pytest.raises(QuantizeError, match=message):
        plan(checkpoint)


@pytest.mark.parametrize("nested", [False, True])
def test_an_index_may_name_a_tied_head(nested: bool, tmp_path: Path) -> None:
    tensors, config = model(tie_word_embeddings=True)
    tensors.pop("lm_head.weight", None)
    source = save(tmp_path / "source", tensors, config, shard_of=lambda name: len(name) % 2)
    index = json.loads((source / INDEX).read_text())["weight_map"]
    file = index["model.embed_tokens.weight"]
    write_index(source, index | {"lm_head.weight": file})
    convert(source, tmp_path / "target")
    assert problems(source, tmp_path / "target") == []
    with Checkpoint(tmp_path / "target", decode=False) as target:
        assert "lm_head.weight" not in target.stored
    # The head alone, and only where the config says that it is tied.
    for change in ({"tie_word_embeddings": False}, {"tie_word_embeddings": None}):
        said = config | change
        if nested:
            said = (
                {"text_config": said, "tie_word_embeddings": True}
                if change["tie_word_embeddings"] is False
                else {"text_config": said}
            )
        (source / "config.json").write_text(json.dumps(said))
        with pytest.raises(
            QuantizeError, match=f"lm_head.weight is in {file}, but it is not there"
        ):
            Checkpoint(source)
    (source / "config.json").write_text(json.dumps(config))
    write_index(source, index | {"model.layers.0.head.weight": file})
    with pytest.raises(QuantizeError, match=r"layers.0.head.weight is in .*, but it is not there"):
        Checkpoint(source)
