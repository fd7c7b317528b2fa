"""Counts and layers in a config that the tensors contradict: one error, before anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantize.errors import QuantizeError
from quantize.experts.layers import check_layers_are_there
from tests.quantize import checkpoints
from tests.quantize.checkpoints import convert
from tests.quantize.test_cli import refusal, run

Folders = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def changed(
    source: Path, folder: Path, config: dict[str, Any], but: tuple[str, ...] = ()
) -> tuple[Path, dict[str, Any]]:
    """A copy of ``source`` with other values in its config, without some tensors."""
    before: dict[str, Any] = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not any(part in n for part in but)}
    return checkpoints.save(folder, kept, before | config), before


def refused_everywhere(bad: Path, good: Path, tmp_path: Path) -> str:
    """What ``inspect``, ``quantize`` and both kinds of ``verify`` say of a config: once each."""
    messages = [
        refusal("inspect", bad),
        refusal("quantize", bad, tmp_path / "out"),
    ]
    assert messages[0] == messages[1]
    assert not (tmp_path / "out").exists()
    target = tmp_path / "target"
    convert(good, target)
    ours = json.loads((target / "config.json").read_text())
    theirs = json.loads((bad / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(ours | theirs))
    alone = run("verify", target)
    assert alone.exit_code == 1
    assert run("verify", bad, target).exit_code == 1
    return f"{messages[0]}\n{' '.join(alone.output.split())}"


# -- how many experts a token goes to --------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 5, 1000])
def test_more_or_fewer_experts_for_a_token_than_there_are(
    value: int, saved: Folders, tmp_path: Path
) -> None:
    good = saved("qwen3_moe")
    bad, _ = changed(good, tmp_path / "bad", {"num_experts_per_tok": value})
    said = refused_everywhere(bad, good, tmp_path)
    assert said.count(f"num_experts_per_tok is {value}, expected 1 to 4") == 2
    assert "model.layers.0.mlp.experts has 4 experts" in said


@pytest.mark.parametrize("value", [1, 4])
def test_one_expert_or_all_of_them(value: int, saved: Folders, tmp_path: Path) -> None:
    good, _ = changed(saved("qwen3_moe"), tmp_path / "good", {"num_experts_per_tok": value})
    assert run("inspect", good).exit_code == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts_per_tok": None, "moe_topk": [2, 5]},
        {"num_experts_per_tok": None, "moe_topk": [0, 2]},
        {"num_experts_per_tok": None, "moe_k": 5},
        {"block_configs": [{"ffn": {"num_experts_per_tok": 2}}, {"num_experts_per_tok": 9}]},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_lists_blocks_and_nested_configs(
    fields: dict[str, Any], nested: bool, saved: Folders, tmp_path: Path
) -> None:
    bad, before = changed(saved("qwen3_moe"), tmp_path / "bad", {})
    config = before | fields
    (bad / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    message = refusal("inspect", bad, "--gate", "silu")
    assert "expected 1 to 4" in message
    layer = 0 if fields.get("moe_topk", [1])[0] == 0 or "moe_k" in fields else 1
    assert f"model.layers.{layer}.mlp.experts" in message


def test_what_generation_calls_so(saved: Folders, tmp_path: Path) -> None:
    """Old configs hold ``top_k`` of sampling, which is no number of experts."""
    good, _ = changed(saved("qwen3_moe"), tmp_path / "good", {"top_k": 50})
    assert run("inspect", good).exit_code == 0


# -- how many layers there are ---------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_more_layers_than_have_tensors(nested: bool, saved: Folders, tmp_path: Path) -> None:
    good = saved("qwen3_moe")
    bad, before = changed(good, tmp_path / "bad", {"num_hidden_layers": 3})
    if nested:
        config = {"text_config": before | {"num_hidden_layers": 3}}
        (bad / "config.json").write_text(json.dumps(config))
        said = refusal("inspect", bad, "--gate", "silu")
    else:
        said = refused_everywhere(bad, good, tmp_path)
    assert (
        said.count("the model has 3 layers, but there is no tensor of model.layers.2") == 2 - nested
    )


def test_a_layer_in_the_middle(saved: Folders, tmp_path: Path) -> None:
    bad, _ = changed(saved("qwen3_moe"), tmp_path / "bad", {}, ("layers.0.",))
    assert "there is no tensor of model.layers.0" in refusal("inspect", bad)


def test_layers_in_which_nothing_is(saved: Folders) -> None:
    """Puzzle leaves out whole layers; LongCat counts pairs of layers in another key."""
    prefixes = ["backbone.layers.0.mixer.experts"]
    names = ["backbone.layers.0.norm.weight", "mtp.layers.1.norm.weight", "x.blocks.1.w"]
    nothing = {"attention": {"no_op": True}, "ffn": {"no_op": True}, "parallel_blocks": None}
    there = {"attention": {"no_op": True}, "ffn": {"no_op": False}}
    config = {"num_hidden_layers": 2, "block_configs": [there, nothing]}
    check_layers_are_there(config, prefixes, names, "config.json")
    with pytest.raises(QuantizeError, match=r"no tensor of backbone\.layers\.1"):
        check_layers_are_there(config | {"block_configs": [there, there]}, prefixes, names, "")
    check_layers_are_there({"num_layers": 1, "num_hidden_layers": 2}, prefixes, names, "")


# -- which layers have experts ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense", "but", "what"),
    [
        (2, (), "no layer of the model has experts by it (first_k_dense_replace = 2"),
        (0, (), "layer 0 has experts by it (first_k_dense_replace = 0"),
        (1, (), ""),
    ],
)
def test_first_k_dense_replace(
    dense: int, but: tuple[str, ...], what: str, saved: Folders, tmp_path: Path
) -> None:
    fields = {"first_k_dense_replace": dense, "mlp_layer_types": None}
    source, _ = changed(saved("deepseek_v3"), tmp_path / "source", fields, but)
    if not what:
        assert run("inspect", source).exit_code == 0
        return
    message = refusal("inspect", source)
    assert what in message
    assert "correct the config" in message
    assert "--gate" not in message


def test_experts_in_a_layer_that_the_config_calls_dense(saved: Folders, tmp_path: Path) -> None:
    source, _ = changed(saved("qwen3_moe"), tmp_path / "source", {"mlp_only_layers": [1]})
    message = refusal("inspect", source)
    assert "layer 1 has no experts by it (" in message
    assert "mlp_only_layers = [1]" in message
    assert "--gate" not in message
