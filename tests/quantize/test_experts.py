"""Finding routed experts by names and shapes: every known layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.find import find, left_as_is
from quantize.experts.gates import Gate
from quantize.experts.group import ExpertGroup
from tests.quantize import checkpoints
from tests.quantize.checkpoints import EXPERTS, HIDDEN, INTERMEDIATE
from tests.trained import Sizes

Folders = Callable[[str], Path]

PREFIXES = {
    "qwen3_moe": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
    "mixtral": [
        "model.layers.0.block_sparse_moe.experts",
        "model.layers.1.block_sparse_moe.experts",
    ],
    "deepseek_v3": ["model.layers.1.mlp.experts"],
    "minimax_m3": ["model.layers.1.mlp.experts"],
}


def groups(folder: Path) -> list[ExpertGroup]:
    with Checkpoint(folder) as checkpoint:
        return find(checkpoint)


def refusal(folder: Path) -> str:
    with pytest.raises(QuantizeError) as caught, Checkpoint(folder) as checkpoint:
        find(checkpoint)
    return str(caught.value)


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of ``source`` whose tensors ``change`` has edited in place."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    return checkpoints.save(target, tensors, json.loads((source / "config.json").read_text()))


def all_weights(folder: Path, interleaved: bool = False) -> dict[str, torch.Tensor]:
    """What the groups say that each expert's gate, up and down are."""
    out = {}
    with Checkpoint(folder) as checkpoint:
        for group in find(checkpoint):
            for expert in range(group.num_experts):
                gate, up = group.gate_up(checkpoint, expert, interleaved)
                down = group.down(checkpoint, expert)
                assert gate.shape == up.shape == (group.intermediate, group.hidden)
                assert down.shape == (group.hidden, group.intermediate)
                for name, tensor in zip(group.modules(expert), (gate, up, down), strict=True):
                    out[f"{name}.weight"] = tensor.clone()
    return out


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


def routed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if ".experts." in n}


# -- what is found ---------------------------------------------------------------------------------


def test_a_trained_model_as_transformers_writes_it(trained: Path) -> None:
    found, sizes = groups(trained), Sizes.of(trained)
    assert [g.prefix for g in found] == [f"model.layers.{i}.mlp.experts" for i in sizes.sparse]
    measures = sizes.experts, sizes.hidden, sizes.intermediate
    for group in found:
        assert (group.num_experts, group.hidden, group.intermediate) == measures
        assert (group.fused, group.transposed) == (True, False)
        assert group.tensor_names == (f"{group.prefix}.gate_up_proj", f"{group.prefix}.down_proj")
        assert group.parameters == sizes.expert_weights // len(sizes.sparse)


def test_a_trained_model_as_the_hub_publishes_it(trained: Path, trained_hub: Path) -> None:
    found, sizes = groups(trained_hub), Sizes.of(trained)
    prefix = "model.layers.{}.block_sparse_moe.experts"
    assert [g.prefix for g in found] == [prefix.format(i) for i in sizes.sparse]
    for group in found:
        measures = sizes.experts, sizes.hidden, sizes.intermediate
        assert (group.num_experts, group.hidden, group.intermediate) == measures
        assert not group.fused
        assert group.projections == ("w1", "w3", "w2")
        assert len(group.tensor_names) == 3 * sizes.experts
    # The same weights, whichever layout they are read from.
    with (
        safe_open(trained / "model.safetensors", "pt") as fused,
        Checkpoint(trained_hub) as hub,
    ):
        both = fused.get_slice("model.layers.3.mlp.experts.gate_up_proj")[11]
        gate, up = found[2].gate_up(hub, 11)
        assert torch.equal(torch.cat((gate, up)), both)
        down = fused.get_slice("model.layers.3.mlp.experts.down_proj")[11]
        assert torch.equal(found[2].down(hub, 11), down)


@pytest.mark.parametrize("name", PREFIXES)
def test_as_save_pretrained_writes_it(name: str, saved: Folders) -> None:
    found = groups(saved(name))
    assert [g.prefix for g in found] == PREFIXES[name]
    for group in found:
        assert (group.num_experts, group.hidden, group.intermediate) == (
            EXPERTS,
            HIDDEN,
            INTERMEDIATE,
        )
        assert group.fused == (name == "minimax_m3")  # Transformers splits the others on saving
        assert not group.transposed


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_weights_of_separate_experts(name: str, saved: Folders) -> None:
    stored = load_file(saved(name) / "model.safetensors")
    assert_equal(all_weights(saved(name)), routed(stored))


@pytest.mark.parametrize("name", PREFIXES)
def test_weights_of_stacked_experts(name: str, stacked: Folders) -> None:
    found = groups(stacked(name))
    assert all(group.fused and not group.transposed for group in found)
    stored = load_file(stacked(name) / "model.safetensors")
    assert_equal(all_weights(stacked(name)), routed(checkpoints.per_expert(stored)))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_stacked_and_separate_are_the_same_model(
    name: str, saved: Folders, stacked: Folders
) -> None:
    """``saved`` and ``stacked`` come from one seed: Transformers itself split the first."""
    one, other = all_weights(saved(name)), all_weights(stacked(name))
    assert len(one) == len(other)
    for ours, theirs in zip(one.values(), other.values(), strict=True):
        assert torch.equal(ours, theirs)


def test_minimax_m3_with_one_tensor_per_expert(stacked: Folders, tmp_path: Path) -> None:
    stored = load_file(stacked("minimax_m3") / "model.safetensors")
    split = checkpoints.per_expert(stored, ("w1", "w3", "w2"))
    config = json.loads((stacked("minimax_m3") / "config.json").read_text())
    folder = checkpoints.save(tmp_path / "split", split, config)
    assert groups(folder)[0].projections == ("w1", "w3", "w2")
    assert_equal(all_weights(folder), routed(split))


@pytest.mark.parametrize("interleaved", [False, True])
def test_transposed_stacked_experts(interleaved: bool, tmp_path: Path) -> None:
    """``[experts, in, out]``, as GPT-OSS and Llama 4 have it."""
    gate, up = torch.randn(2, EXPERTS, INTERMEDIATE, HIDDEN).unbind()
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE)
    both = torch.stack((gate, up), 2).flatten(1, 2) if interleaved else torch.cat((gate, up), 1)
    tensors = {"l.experts.gate_up_proj": both.mT, "l.experts.down_proj": down.mT}
    folder = checkpoints.save(tmp_path / "t", tensors, {"hidden_size": HIDDEN})
    (group,) = groups(folder)
    assert group.transposed
    assert (group.hidden, group.intermediate) == (HIDDEN, INTERMEDIATE)
    got = all_weights(folder, interleaved)
    for expert in range(EXPERTS):
        assert torch.equal(got[f"l.experts.{expert}.gate_proj.weight"], gate[expert])
        assert torch.equal(got[f"l.experts.{expert}.up_proj.weight"], up[expert])
        assert torch.equal(got[f"l.experts.{expert}.down_proj.weight"], down[expert])


@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 16), (32, 32), (32, 64), (64, 32)])
@pytest.mark.parametrize("transposed", [False, True])
def test_sizes_that_could_be_confused(
    hidden: int, intermediate: int, transposed: bool, tmp_path: Path
) -> None:
    """hidden = 2 * intermediate and the like leave the square matrices' orientation to the others.

    Where hidden = intermediate, ``down_proj`` is square, but ``gate_up_proj`` is not.
    """
    both, down = torch.randn(2, 2 * intermediate, hidden), torch.randn(2, hidden, intermediate)
    tensors = {"l.experts.gate_up_proj": both, "l.experts.down_proj": down}
    if transposed:
        tensors = {name: t.mT for name, t in tensors.items()}
    folder = checkpoints.save(tmp_path / "x", tensors, {"hidden_size": hidden})
    (group,) = groups(folder)
    assert (group.transposed, group.hidden, group.intermediate) == (
        transposed,
        hidden,
        intermediate,
    )
    got = all_weights(folder)
    assert torch.equal(got["l.experts.1.down_proj.weight"], down[1])
    assert torch.equal(got["l.experts.1.gate_proj.weight"], both[1, :intermediate])


def test_layers_come_in_numeric_order(tmp_path: Path) -> None:
    tensors = {}
    for layer in (10, 2, 1):
        tensors[f"m.{layer}.experts.gate_up_proj"] = torch.zeros(2, 64, 16)
        tensors[f"m.{layer}.experts.down_proj"] = torch.zeros(2, 16, 32)
    folder = checkpoints.save(tmp_path / "x", tensors, {})
    assert [g.prefix for g in groups(folder)] == ["m.1.experts", "m.2.experts", "m.10.experts"]


def test_shared_experts_and_routers_are_no_routed_experts(saved: Folders) -> None:
    with Checkpoint(saved("deepseek_v3")) as checkpoint:
        sources = {name for group in find(checkpoint) for name in group.tensor_names}
        assert any(".shared_experts." in name for name in checkpoint.tensors)
    assert not any("shared" in name or name.endswith("gate.weight") for name in sources)


def test_no_activation_is_needed(tmp_path: Path) -> None:
    """Structure alone: a config without hidden_act, and no model class at all."""
    tensors = {
        "x.experts.gate_up_proj": torch.zeros(3, 64, 16),
        "x.experts.down_proj": torch.zeros(3, 16, 32),
    }
    (group,) = groups(checkpoints.save(tmp_path / "x", tensors, {}))
    assert group.num_experts == 3


def test_expert_count_in_a_nested_text_config(stacked: Folders, tmp_path: Path) -> None:
    stored = load_file(stacked("qwen3_moe") / "model.safetensors")
    folder = checkpoints.save(tmp_path / "x", stored, {"text_config": {"num_experts": EXPERTS}})
    assert len(groups(folder)) == 2
    (folder / "config.json").write_text(json.dumps({"text_config": {"num_experts": 5}}))
    assert "num_experts = 5" in refusal(folder)


# -- biases, experts without a gate, layers that are left ------------------------------------------


def test_biases_of_gpt_oss(saved: Folders) -> None:
    """Split as their weights are: gate and up alternate."""
    stored = load_file(saved("gpt_oss") / "model.safetensors")
    with Checkpoint(saved("gpt_oss")) as checkpoint:
        for group in find(checkpoint):
            both = stored[f"{group.prefix}.gate_up_proj_bias"]
            down = stored[f"{group.prefix}.down_proj_bias"]
            assert group.bias_names == (
                f"{group.prefix}.gate_up_proj_bias",
                f"{group.prefix}.down_proj_bias",
            )
            assert set(group.bias_names) <= set(group.tensor_names)
            for expert in range(EXPERTS):
                assert_equal(
                    group.biases(checkpoint, expert, True),
                    {
                        f"{group.prefix}.{expert}.gate_proj": both[expert, 0::2],
                        f"{group.prefix}.{expert}.up_proj": both[expert, 1::2],
                        f"{group.prefix}.{expert}.down_proj": down[expert],
                    },
                )
                assert group.tensors_of(expert) == group.tensor_names


def test_biases_of_separate_experts(saved: Folders, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(routed(tensors)):
            rows = tensors[name].shape[0]
            tensors[name.replace(".weight", ".bias")] = torch.randn(rows).bfloat16()

    folder = changed(saved("mixtral"), tmp_path / "x", add)
    stored = load_file(folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint:
        group = find(checkpoint)[1]
        modules = group.modules(2)
        assert_equal(
            group.biases(checkpoint, 2), {name: stored[f"{name}.bias"] for name in modules}
        )
        assert group.tensors_of(2) == tuple(
            f"{name}.{what}" for what in ("weight", "bias") for name in modules
        )


@pytest.mark.parametrize("stack", [True, False])
def test_experts_without_a_gate(stack: bool, tmp_path: Path) -> None:
    up, down = torch.randn(4, 48, 32), torch.randn(4, 32, 48)
    tensors = {"x.experts.up_proj": up, "x.experts.down_proj": down}
    if not stack:
        tensors = {
            f"x.experts.{e}.{name}.weight": tensors[f"x.experts.{name}"][e]
            for e in range(4)
            for name in ("up_proj", "down_proj")
        }
    with Checkpoint(checkpoints.save(tmp_path / "x", tensors, {"hidden_size": 32})) as checkpoint:
        (group,) = find(checkpoint)
        assert (group.gated, group.projections) == (False, ("up_proj", "down_proj"))
        assert group.parameters == 4 * 2 * 48 * 32
        assert group.modules(3) == ("x.experts.3.up_proj", "x.experts.3.down_proj")
        (got,) = group.gate_up(checkpoint, 3)
        assert torch.equal(got, up[3])
        assert torch.equal(group.down(checkpoint, 3), down[3])
        group.check_gate(Gate("relu2"))
        with pytest.raises(
            QuantizeError, match=r"x.experts: its experts have no gate.*silu.*takes"
        ):
            group.check_gate(Gate("silu"))


def test_an_activation_without_a_gate_for_experts_with_one(saved: Folders) -> None:
    (group, _) = groups(saved("mixtral"))
    group.check_gate(Gate("swiglu_oai", limit=7.0))
    with pytest.raises(QuantizeError, match=r"its experts have a gate, .*relu2, takes none"):
        group.check_gate(Gate("relu2"))


@pytest.mark.parametrize(
    "prefix",
    [
        "model.layers.2.mlp.experts",
        "model.language_model.layers.17.mlp.experts",
        "mtp.layers.0.mlp.experts",
        "mtp.0.ffn.experts",
        "model.mtp_layers.0.mlp.experts",
        "model.mtp.layers.1.mtp_block.mlp.experts",
        "model.nextn_predict.0.mlp.experts",
    ],
)
@pytest.mark.parametrize("stack", [True, False])
def test_layers_that_predict_several_tokens_are_left(
    prefix: str, stack: bool, stacked: Folders, tmp_path: Path
) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        extra = {
            f"{prefix}.gate_up_proj": torch.zeros(EXPERTS, 96, 32),
            f"{prefix}.down_proj": torch.zeros(EXPERTS, 32, 48),
        }
        tensors.update(extra if stack else checkpoints.per_expert(extra))

    folder = changed(stacked("qwen3_moe"), tmp_path / "x", add)
    with Checkpoint(folder) as checkpoint:
        assert [g.prefix for g in find(checkpoint)] == PREFIXES["qwen3_moe"]
        assert left_as_is(checkpoint) == [prefix]


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("stack", [True, False])
def test_layers_that_are_left_are_copied_and_ignored(
    layout: str, stack: bool, stacked: Folders, tmp_path: Path
) -> None:
    prefix = "model.layers.2.mlp.experts"
    extra = {
        f"{prefix}.gate_up_proj": torch.randn(EXPERTS, 96, 32).bfloat16(),
        f"{prefix}.down_proj": torch.randn(EXPERTS, 32, 48).bfloat16(),
    }
    extra = extra if stack else checkpoints.per_expert(extra)
    folder = changed(stacked("qwen3_moe"), tmp_path / "x", lambda t: t.update(extra))
    checkpoints.convert(folder, tmp_path / "y", layout)
    after = load_file(tmp_path / "y" / "model.safetensors")
    assert_equal({name: after[name] for name in after if name.startswith(prefix)}, extra)
    config = json.loads((tmp_path / "y" / "config.json").read_text())["quantization_config"]
    ignored = config["ignore"]
    # What vLLM asks for: the layer (ModelOpt's), its first expert's projections (the other's).
    assert {prefix, f"{prefix}.0.gate_proj", f"{prefix}.0.up_proj", f"{prefix}.0.down_proj"} <= {
        *ignored
    }
    assert not any("layers.1.mlp.experts" in name for name in ignored)


def test_tensors_and_activation_that_disagree(saved: Folders, tmp_path: Path) -> None:
    """Without any expert's gate, the tensors look like those of experts that have none."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("gate_proj.weight") and ".experts." in n]:
            del tensors[name]

    folder = changed(saved("qwen3_moe"), tmp_path / "x", drop)
    with pytest.raises(QuantizeError, match=r"its experts have no gate, .*tensors are missing"):
        checkpoints.convert(folder, tmp_path / "y")


def test_only_layers_that_predict_several_tokens(tmp_path: Path) -> None:
    tensors = {
        "mtp.experts.gate_up_proj": torch.zeros(2, 64, 16),
        "mtp.experts.down_proj": torch.zeros(2, 16, 32),
    }
    message = refusal(checkpoints.save(tmp_path / "x", tensors, {}))
    assert "Multi-token-prediction layers stay as they are: mtp.experts." in message
