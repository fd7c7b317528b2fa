"""Which tensors are experts of which size and orientation: the config must agree, or settle it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.find import find, left_as_is
from quantize.experts.gates import Gate
from quantize.experts.group import ExpertGroup
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize import checkpoints, families
from tests.quantize.put_back import written

EXPERTS, HIDDEN, INTERMEDIATE = 4, 64, 32
CONFIG = {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts": EXPERTS}
SILU = Gate("silu")
Tensors = dict[str, torch.Tensor]


def separate(hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, gated: bool = True) -> Tensors:
    """Stacks of gate, up and down, as ``[experts, out, in]``."""
    torch.manual_seed(1)
    shapes = {"gate_proj": (intermediate, hidden), "up_proj": (intermediate, hidden)}
    shapes |= {"down_proj": (hidden, intermediate)}
    if not gated:
        del shapes["gate_proj"]
    return {
        f"model.layers.0.mlp.experts.{name}": torch.randn(EXPERTS, *shape).bfloat16()
        for name, shape in shapes.items()
    }


def single(
    layer: int, experts: int, hidden: int, intermediate: int, above: str = "model"
) -> Tensors:
    prefix = f"{above}.layers.{layer}.mlp.experts"
    return {
        f"{prefix}.{e}.{name}.weight": torch.randn(shape).bfloat16()
        for e in range(experts)
        for name, shape in (
            ("gate_proj", (intermediate, hidden)),
            ("up_proj", (intermediate, hidden)),
            ("down_proj", (hidden, intermediate)),
        )
    }


def groups(folder: Path) -> list[ExpertGroup]:
    with Checkpoint(folder) as checkpoint:
        return find(checkpoint)


def refusal(folder: Path) -> str:
    with pytest.raises(QuantizeError) as caught:
        groups(folder)
    return str(caught.value)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("where", ["top", "text_config", "list"])
def test_the_config_settles_the_orientation(transposed: bool, where: str, tmp_path: Path) -> None:
    """Whichever way they are stored, what is written is each expert's [out, in] in NVFP4."""
    tensors = separate()
    config: dict[str, Any] = {
        "top": CONFIG,
        "text_config": {"text_config": CONFIG, "vision_config": {"hidden_size": INTERMEDIATE}},
        "list": CONFIG | {"num_hidden_layers": 2, "moe_intermediate_size": [INTERMEDIATE, 48]},
    }[where]
    stored = {n: t.mT for n, t in tensors.items()} if transposed else dict(tensors)
    stored["model.layers.1.input_layernorm.weight"] = torch.ones(HIDDEN)
    source = checkpoints.save(tmp_path / "source", stored, config)
    checkpoints.convert(source, tmp_path / "target", gate=SILU)
    restored = written(tmp_path / "target")
    assert len(restored) == 3 * EXPERTS
    for name, stack in tensors.items():
        prefix, _, kind = name.rpartition(".")
        for expert in range(EXPERTS):
            ours = restored[f"{prefix}.{expert}.{kind}.weight"]
            assert ours.shape == stack[expert].shape
            assert (ours - stack[expert]).norm() / stack[expert].double().norm() < 0.13


@pytest.mark.parametrize("config", [{}, {"hidden_size": 48, "moe_intermediate_size": 48}])
def test_an_orientation_that_nothing_settles(config: dict[str, Any], tmp_path: Path) -> None:
    square = config.get("hidden_size", 0)
    tensors = separate(square, square) if square else separate()
    message = refusal(checkpoints.save(tmp_path, tensors, config))
    assert message.startswith("model.safetensors: model.layers.0.mlp.experts.gate_proj [4, ")
    assert "[experts, out, in] or [experts, in, out]" in message


def test_the_class_settles_a_square_one(tmp_path: Path) -> None:
    """Nemotron-H's own parameters are separate stacks of up and down."""
    config = families.config("nemotron_h")
    config.moe_intermediate_size = config.hidden_size = 32
    tensors = {
        name.replace("mlp", "mixer").replace("model", "backbone"): tensor
        for name, tensor in separate(32, 32, gated=False).items()
    }
    source = checkpoints.save(tmp_path, tensors, config.to_dict())
    (group,) = groups(source)
    assert not group.transposed
    with Checkpoint(source) as checkpoint:
        down = tensors["backbone.layers.0.mixer.experts.down_proj"]
        assert torch.equal(group.down(checkpoint, 1), down[1])
    changed = config.to_dict() | {"model_type": "not_known"}
    assert "nor a class" in refusal(checkpoints.save(tmp_path / "unknown", tensors, changed))


@pytest.mark.parametrize("form", ["separate", "joined", "single"])
@pytest.mark.parametrize("key", ["hidden_size", "moe_intermediate_size"])
def test_a_size_that_the_config_contradicts(form: str, key: str, tmp_path: Path) -> None:
    tensors = {
        "separate": separate(),
        "joined": {
            "model.layers.0.mlp.experts.gate_up_proj": torch.ones(EXPERTS, 2 * 32, HIDDEN),
            "model.layers.0.mlp.experts.down_proj": torch.ones(EXPERTS, HIDDEN, 32),
        },
        "single": single(0, EXPERTS, HIDDEN, INTERMEDIATE),
    }[form]
    assert groups(checkpoints.save(tmp_path / "good", tensors, CONFIG))
    message = refusal(checkpoints.save(tmp_path / "bad", tensors, CONFIG | {key: 96}))
    assert f"{key} = 96" in message
    assert "model.safetensors: model.layers.0.mlp.experts" in message


def test_single_experts_that_are_stored_the_other_way(tmp_path: Path) -> None:
    message = refusal(checkpoints.save(tmp_path, single(0, EXPERTS, INTERMEDIATE, HIDDEN), CONFIG))
    assert "exchanged" in message


def test_a_size_of_the_experts_own_counts_before_the_general_one(tmp_path: Path) -> None:
    config = CONFIG | {"intermediate_size": 128}
    assert groups(checkpoints.save(tmp_path / "a", separate(), config))
    general = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    assert groups(checkpoints.save(tmp_path / "b", separate(), general))
    latent = CONFIG | {"hidden_size": 128, "moe_latent_size": HIDDEN}
    assert groups(checkpoints.save(tmp_path / "c", separate(), latent))


def test_lists_with_an_entry_for_each_layer(tmp_path: Path) -> None:
    """Hunyuan-A13B: 8 experts a layer and 4 layers were once 4 groups of 2."""
    tensors = single(0, 8, HIDDEN, 32) | single(1, 6, HIDDEN, 48) | single(2, 8, HIDDEN, 32)
    lists = {"num_experts": [8, 6, 8, 8], "moe_intermediate_size": [32, 48, 32, 32]}
    tensors |= single(3, 8, HIDDEN, 32)
    config = CONFIG | {"num_hidden_layers": 4} | lists
    found = groups(checkpoints.save(tmp_path / "good", tensors, config))
    assert [(g.num_experts, g.intermediate) for g in found] == [(8, 32), (6, 48), (8, 32), (8, 32)]
    for key, wrong in (("num_experts", [8, 8, 8, 8]), ("moe_intermediate_size", [32] * 4)):
        message = refusal(checkpoints.save(tmp_path / key, tensors, config | {key: wrong}))
        assert "layers.1.mlp.experts" in message
    short = config | {"moe_intermediate_size": [32, 48]}
    message = refusal(checkpoints.save(tmp_path / "short", tensors, short))
    assert "moe_intermediate_size is a list of 2, but there are 4 layers" in message


def test_what_a_block_says_replaces_what_the_config_says(tmp_path: Path) -> None:
    """Puzzle: the numbers at the top are the largest."""
    tensors = single(0, 8, HIDDEN, 48) | single(2, 6, HIDDEN, 32)
    blocks: list[dict[str, Any]] = [
        {"n_routed_experts": 8, "moe_intermediate_size": 48},
        {"block_type": "attention"},
        {"ffn": {"n_routed_experts": 6, "moe_intermediate_size": 32}},
    ]
    config = {"hidden_size": HIDDEN, "num_experts": 8, "num_hidden_layers": None}
    config |= {"block_configs": blocks}
    found = groups(checkpoints.save(tmp_path / "good", tensors, config))
    assert [(g.num_experts, g.intermediate) for g in found] == [(8, 48), (6, 32)]
    blocks[2]["ffn"]["n_routed_experts"] = 8
    message = refusal(checkpoints.save(tmp_path / "bad", tensors, config))
    assert "model.layers.2.mlp.experts has 6 experts" in message


def test_a_config_that_contradicts_itself(tmp_path: Path) -> None:
    tensors = single(0, 4, HIDDEN, 32) | single(1, 8, HIDDEN, 32) | single(2, 4, HIDDEN, 32)
    config = CONFIG | {"num_local_experts": 8, "num_hidden_layers": 3}
    message = refusal(checkpoints.save(tmp_path, tensors, config))
    assert "num_local_experts = 8, num_experts = 4" in message
    assert "model.layers.1.mlp.experts has 8" in message
    assert "model.layers.0.mlp.experts and 1 more have 4" in message


# -- gate and up, row by row or one after the other ------------------------------------------------


def test_a_stated_gate_in_another_order_than_the_class_has(tmp_path: Path) -> None:
    checkpoints.build("gpt_oss").save_pretrained(tmp_path)
    stated = Gate("swiglu_oai", 1.702, 1.0, 7.0)
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(QuantizeError, match="alternate between gate and up"):
            plan(checkpoint, Options(gate=stated))
        right = Gate("swiglu_oai", 1.702, 1.0, 7.0, True)
        assert plan(checkpoint, Options(gate=right)).gates.default == right


# -- other parts of the model ----------------------------------------------------------------------

TOWER = {"hidden_size": 32, "moe_intermediate_size": 48, "num_hidden_layers": 9}


def note(folder: Path, *include: str) -> tuple[list[str], tuple[str, ...], list[str]]:
    with Checkpoint(folder) as checkpoint:
        steps = plan(checkpoint, Options(gate=SILU, include=include))
        return [g.prefix for g in steps.groups], steps.notes, steps.ignore


@pytest.mark.parametrize(
    ("above", "described"),
    [
        ("vision_encoder", {"vision_config": TOWER}),
        ("model.visual", {}),
        ("audio_tower", {"audio_config": TOWER}),
        ("talker.model", {"talker_config": {"text_config": TOWER}}),
        ("painter.model", {"painter_config": TOWER}),
    ],
)
def test_experts_outside_of_the_language_model(
    above: str, described: dict[str, Any], tmp_path: Path
) -> None:
    language = single(0, EXPERTS, HIDDEN, INTERMEDIATE, "model.language_model")
    tensors = language | single(8, 2, 32, 48, above)
    config = {"text_config": CONFIG | {"num_hidden_layers": 1}} | described
    folder = checkpoints.save(tmp_path, tensors, config)
    ours, theirs = "model.language_model.layers.0.mlp.experts", f"{above}.layers.8.mlp.experts"
    part = above.removeprefix("model.").partition(".")[0]
    taken, (said,), ignored = note(folder)
    assert taken == [ours]
    assert said.startswith("Experts outside of the language model stay as they are: " + theirs)
    assert theirs in ignored
    assert note(folder, "*layers.[0-9].*")[0] == [ours]  # no request for a part of the model
    assert f"'*{part}*'" in said
    taken, notes, ignored = note(folder, f"*{part}*", "*language*")
    assert taken == sorted([ours, theirs])
    assert not notes
    assert theirs not in ignored


def test_a_part_that_is_asked_for_agrees_with_its_own_config(tmp_path: Path) -> None:
    tensors = single(0, EXPERTS, HIDDEN, INTERMEDIATE) | single(0, 2, 32, 32, "vision_encoder")
    config = {"text_config": CONFIG, "vision_config": TOWER}
    with (
        Checkpoint(checkpoints.save(tmp_path, tensors, config)) as checkpoint,
        pytest.raises(QuantizeError, match="moe_intermediate_size = 48"),
    ):
        plan(checkpoint, Options(gate=SILU, include=("*vision*",)))


def test_experts_for_images_within_the_language_model(tmp_path: Path) -> None:
    """Ernie 4.5 VL: a layer's name says that they are for images, but no part above it does."""
    model = families.build("ernie4_5_vl_moe")
    with Checkpoint(families.save(model, "ernie4_5_vl_moe", families.LAYOUTS[1], tmp_path)) as c:
        assert any("vision" in group.prefix for group in find(c))
        assert left_as_is(c) == []


# -- what is excluded is what the unquantized model stores -----------------------------------------


def assert_same_logits(model: Any, *weights: dict[str, torch.Tensor]) -> None:
    """Of the model with either of two sets of weights."""
    logits = []
    for state in weights:
        model.load_state_dict(state)
        with torch.no_grad():
            logits.append(model(torch.arange(12)[None]).logits)
    assert torch.equal(*logits)
    assert logits[0].isfinite().all()


@pytest.mark.parametrize("square", [False, True])
def test_excluded_experts_of_gpt_oss_in_mxfp4(square: bool, tmp_path: Path) -> None:
    """Logits of Transformers' class: from its own dequantized weights, and from what is written."""
    size = 64 if square else 96
    config = checkpoints.gpt_oss(hidden_size=64, intermediate_size=size, num_hidden_layers=2)
    torch.manual_seed(3)
    model = transformers.GptOssForCausalLM(config).bfloat16().eval()
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(119, 123, blocks, dtype=torch.uint8)
    described = config.to_dict() | {"architectures": ["GptOssForCausalLM"]}
    described["quantization_config"] = {"quant_method": "mxfp4"}
    source = checkpoints.save(tmp_path / "source", tensors, described)
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        source, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype="bfloat16"
    ).eval()
    checkpoints.convert(source, tmp_path / "target", exclude=("*layers.1.*",))
    output = load_file(tmp_path / "target" / "model.safetensors")
    assert any(name.endswith("layers.0.mlp.experts.0.down_proj.weight_scale") for name in output)
    state = theirs.state_dict()
    excluded = {n: t for n, t in output.items() if "layers.0.mlp.experts" not in n}
    assert "model.layers.1.mlp.experts.down_proj" in excluded
    assert set(state) - set(excluded) == {n for n in state if "layers.0.mlp.experts" in n}
    assert all(torch.equal(tensor, state[name]) for name, tensor in excluded.items())
    assert_same_logits(model, state, state | excluded)
    written_config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert written_config["quantization_config"]["quant_method"] == "modelopt"


@pytest.mark.parametrize("form", ["fp8", "mxfp8"])
def test_excluded_experts_in_fp8_and_mxfp8(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and logits of Transformers' class, which dequantizes the source itself on loading.
    (Of stacks under its own names Transformers 5.19 loads the codes and leaves the scales aside.)
    """
    # It asks for accelerate, which spreads models over devices, and does not use it here.
    module = "transformers.quantizers.quantizer_finegrained_fp8"
    monkeypatch.setattr(f"{module}.is_accelerate_available", lambda: True)
    model = checkpoints.build("qwen3_moe", moe_intermediate_size=64, hidden_size=64)
    model.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    rows, columns = (16, 32) if form == "fp8" else (1, 32)
    torch.manual_seed(5)
    for name in [n for n in tensors if ".experts." in n or n.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        grid = (*weight.shape[:-2], weight.shape[-2] // rows, weight.shape[-1] // columns)
        if form == "fp8":
            scale = torch.rand(grid) * 1e-3 + 1e-4
        else:
            scale = torch.exp2(torch.randint(-12, -6, grid).float()).to(torch.float8_e8m0fnu)
        tensors[name] = (torch.randn(weight.shape) * 50).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    described = model.config.to_dict() | {"architectures": [type(model).__name__]}
    described["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [rows, columns],
        "scale_fmt": "float" if form == "fp8" else "ue8m0",
    }
    source = checkpoints.save(tmp_path / "source", tensors, described)
    theirs = transformers.Qwen3MoeForCausalLM.from_pretrained(
        source,
        quantization_config=transformers.FineGrainedFP8Config(
            weight_block_size=(rows, columns), dequantize=True
        ),
        dtype="bfloat16",
    ).eval()
    checkpoints.convert(source, tmp_path / "target", exclude=("*layers.1.*",))
    output = load_file(tmp_path / "target" / "model.safetensors")
    assert any(name.endswith("layers.0.mlp.experts.0.down_proj.weight_scale") for name in output)
    assert not any(name.endswith("_scale_inv") for name in output)
    excluded = {n: t for n, t in output.items() if "layers.0.mlp.experts" not in n}
    stem = "model.layers.1.mlp.experts"

    def stack(kind: str) -> torch.Tensor:
        return torch.stack([excluded.pop(f"{stem}.{e}.{kind}.weight") for e in range(4)])

    excluded[f"{stem}.gate_up_proj"] = torch.cat((stack("gate_proj"), stack("up_proj")), 1)
    excluded[f"{stem}.down_proj"] = stack("down_proj")
    state = theirs.state_dict()
    assert set(state) - set(excluded) == {n for n in state if "layers.0.mlp.experts" in n}
    for name, tensor in excluded.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, state[name]), name
    assert_same_logits(model, state, state | excluded)
    written_config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert written_config["quantization_config"]["quant_method"] == "modelopt"
