"""Experts that are refused: what is missing, what does not fit together, what cannot be told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantize import checkpoints
from tests.quantize.test_experts import Folders, changed, refusal, routed


def test_biases_that_only_some_experts_have(saved: Folders, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.0.up_proj.bias"
    folder = changed(
        saved("qwen3_moe"), tmp_path / "x", lambda t: t.update({name: torch.zeros(48)})
    )
    assert "model.layers.0.mlp.experts.0.gate_proj.bias is missing" in refusal(folder)


@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_biases_that_only_some_weights_have(kind: str, saved: Folders, tmp_path: Path) -> None:
    name = f"model.layers.0.mlp.experts.{kind}_bias"
    folder = changed(saved("gpt_oss"), tmp_path / "x", lambda t: t.pop(name))
    message = refusal(folder)
    assert "model.layers.0.mlp.experts: only some of its weights have biases" in message


def test_biases_of_another_shape(saved: Folders, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj_bias"
    folder = changed(
        saved("gpt_oss"), tmp_path / "x", lambda t: t.update({name: torch.zeros(4, 48)})
    )
    assert f"{name} has shape [4, 48], expected [4, 32]" in refusal(folder)


def test_rows_whose_order_is_not_known(tmp_path: Path) -> None:
    tensors = {
        "x.experts.w13_weight": torch.zeros(2, 64, 16),
        "x.experts.w2_weight": torch.zeros(2, 16, 32),
    }
    message = refusal(checkpoints.save(tmp_path / "x", tensors, {"model_type": "new"}))
    assert "x.experts.w13_weight" in message
    assert "known only for Inkling, not for model type 'new'" in message


def test_flat_experts_without_a_count(tmp_path: Path) -> None:
    tensors = {f"x.experts.mlp.{name}": torch.zeros(64, 16) for name in ("w1", "v1", "w2")}
    for ffn in ({}, {"moe_num_experts": 3}, {"moe_num_experts": 0}):
        message = refusal(checkpoints.save(tmp_path / "x", tensors, {"ffn_config": ffn}))
        assert "x.experts.mlp.w1 [64, 16]" in message
        assert "ffn_config.moe_num_experts" in message


def test_a_dense_model_lists_what_was_looked_at(saved: Folders) -> None:
    message = refusal(saved("llama"))
    assert "no routed experts" in message
    for pattern in ("experts.gate_up_proj", "experts.down_proj", "w1|w3|w2"):
        assert pattern in message
    assert "model.layers.N.mlp.gate_proj.weight" in message
    assert str(saved("llama")) in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.1.mlp.experts.3.down_proj.weight",
    ],
)
def test_a_missing_tensor_of_an_expert(name: str, saved: Folders, tmp_path: Path) -> None:
    folder = changed(saved("qwen3_moe"), tmp_path / "x", lambda t: t.pop(name))
    message = refusal(folder)
    assert name in message
    assert "missing" in message


def test_a_missing_last_expert_shows_in_the_count(saved: Folders, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "layers.1.mlp.experts.3." in n]:
            del tensors[name]

    message = refusal(changed(saved("qwen3_moe"), tmp_path / "x", drop))
    assert "model.layers.1.mlp.experts has 3 experts" in message
    assert "= 4" in message


@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_half_of_a_stacked_layer(kind: str, stacked: Folders, tmp_path: Path) -> None:
    name = f"model.layers.1.mlp.experts.{kind}"
    folder = changed(stacked("qwen3_moe"), tmp_path / "x", lambda t: t.pop(name))
    message = refusal(folder)
    assert name in message
    assert "missing" in message


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("gate_proj", (64, 32)), ("up_proj", (48, 16)), ("down_proj", (48, 32)), ("w", (48, 32, 1))],
)
def test_a_separate_expert_of_another_shape(
    kind: str, shape: tuple[int, ...], saved: Folders, tmp_path: Path
) -> None:
    name = f"model.layers.1.mlp.experts.2.{kind if kind != 'w' else 'up_proj'}.weight"
    folder = changed(
        saved("qwen3_moe"), tmp_path / "x", lambda t: t.update({name: torch.zeros(shape)})
    )
    message = refusal(folder)
    assert name in message
    assert str(list(shape)) in message


def test_one_dimensional_experts(tmp_path: Path) -> None:
    tensors = {f"x.experts.0.{n}.weight": torch.zeros(64) for n in ("w1", "w2", "w3")}
    message = refusal(checkpoints.save(tmp_path / "x", tensors, {}))
    assert "x.experts.0.w1.weight" in message
    assert "[64]" in message


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ((4, 96, 32), (4, 32, 64)),  # another intermediate size
        ((4, 96, 32), (3, 32, 48)),  # another number of experts
        ((4, 32, 96), (4, 32, 48)),  # one transposed, the other not
        ((4, 95, 32), (4, 32, 48)),
    ],
)
def test_stacked_shapes_that_do_not_fit_together(
    up: tuple[int, ...], down: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {"x.experts.gate_up_proj": torch.zeros(up), "x.experts.down_proj": torch.zeros(down)}
    message = refusal(checkpoints.save(tmp_path / "x", tensors, {}))
    assert "x.experts.gate_up_proj" in message
    assert str(list(up)) in message
    assert str(list(down)) in message


@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_a_stacked_tensor_of_two_dimensions(kind: str, stacked: Folders, tmp_path: Path) -> None:
    name = f"model.layers.0.mlp.experts.{kind}"
    folder = changed(
        stacked("qwen3_moe"), tmp_path / "x", lambda t: t.update({name: t[name].flatten(0, 1)})
    )
    message = refusal(folder)
    assert name in message
    assert "three dimensions" in message


def test_an_expert_count_that_disagrees_with_the_config(stacked: Folders, tmp_path: Path) -> None:
    folder = changed(stacked("mixtral"), tmp_path / "x", lambda _: None)
    config = json.loads((folder / "config.json").read_text()) | {"num_local_experts": 8}
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(folder)
    assert "has 4 experts" in message
    assert "num_local_experts = 8" in message


@pytest.mark.parametrize("layout", ["saved", "stacked"])
def test_an_fp8_source_is_refused(
    layout: str, saved: Folders, stacked: Folders, tmp_path: Path
) -> None:
    folder = (saved if layout == "saved" else stacked)("qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    name = sorted(routed(tensors))[0]
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    message = refusal(tmp_path)
    assert name in message
    assert "F8_E4M3" in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(("hidden", "intermediate"), [(24, 32), (32, 24), (40, 8)])
@pytest.mark.parametrize("stack", [True, False])
def test_sizes_that_are_no_multiple_of_the_block(
    hidden: int, intermediate: int, stack: bool, tmp_path: Path
) -> None:
    tensors = {
        "x.experts.gate_up_proj": torch.zeros(2, 2 * intermediate, hidden),
        "x.experts.down_proj": torch.zeros(2, hidden, intermediate),
    }
    if not stack:
        tensors = checkpoints.per_expert(tensors)
    message = refusal(checkpoints.save(tmp_path / "x", tensors, {}))
    assert "x.experts" in message
    assert "not a multiple of 16" in message


def test_mixed_projection_names(saved: Folders, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.experts.1.up_proj.weight"
        tensors[name.replace("up_proj", "w3")] = tensors.pop(name)

    message = refusal(changed(saved("qwen3_moe"), tmp_path / "x", rename))
    assert "model.layers.0.mlp.experts" in message
    assert "mixes" in message
