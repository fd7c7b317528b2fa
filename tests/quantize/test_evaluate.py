"""``nvfp4-moe evaluate``: its figures are those of two whole models in memory."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeForCausalLM

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.evaluate import Result, evaluate, predictions
from quantize.evaluate.side import Side, share
from quantize.layouts import LAYOUTS
from tests.plugin.reference import m3_gate
from tests.quantize import evaluated, families
from tests.quantize.checkpoints import convert, per_expert, save
from tests.quantize.test_calibration_forward import FAMILIES, NOT_RUN, rows_of
from tests.quantize.test_quantized_sources import CONFIGS, linears

ROWS = rows_of(3, 16)
DENSE_FIRST: dict[str, dict[str, Any]] = {
    "minimax_m3_vl": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "qwen3_moe": {},
}
SILU = {
    "cohere2_moe", "deepseek_v2", "dots1", "glm4_moe", "jamba", "lfm2_moe", "minimax", "mixtral",
    "olmoe", "qwen2_moe", "qwen3_moe", "solar_open",
}  # fmt: skip
"""Families whose experts ``evaluated`` can take the place of."""
SLOW = {"glm5_next"}
"""Families whose linear attention takes minutes without kernels of its own."""
GATES = {"minimax_m3_vl": m3_gate}


def saved(family: str, folder: Path, **more: Any) -> Path:
    """A tiny random model under its modules' names."""
    model = families.build(family, **DENSE_FIRST.get(family, {}) | more)
    return families.save(model, family, families.LAYOUTS[1], folder)


def run(source: Path, target: Path, rows: torch.Tensor = ROWS, **more: Any) -> Result:
    with Checkpoint(source) as first, Checkpoint(target) as second:
        return evaluate(first, second, rows, **{"dtype": torch.float64, **more})


def check(found: Result, truth: evaluated.Truth, near: float = 1e-6) -> None:
    """Everything that is found, to ``near`` of itself."""
    figures = found.figures
    assert figures.tokens == ROWS.shape[0] * (ROWS.shape[1] - 1)
    assert figures.before == pytest.approx(truth.before, rel=near)
    assert figures.after == pytest.approx(truth.after, rel=near)
    assert figures.change == pytest.approx(100 * (truth.after / truth.before - 1), abs=1e-4)
    assert figures.kl == pytest.approx(truth.kl, rel=10 * near)  # it is a square
    assert figures.kl_error == pytest.approx(truth.kl_error, rel=10 * near)
    assert figures.top1 == truth.top1
    depth = [(each.error, each.median_token) for each in found.depth]
    for got, want in zip(depth, truth.depth, strict=True):
        assert got == pytest.approx(want, rel=10 * near, abs=1e-12)


CASES = [
    ("minimax_m3_vl", "modelopt", None),
    ("minimax_m3_vl", "compressed-tensors", "mxfp8"),
    ("qwen3_moe", "compressed-tensors", None),
    ("qwen3_moe", "modelopt", "fp8"),
    ("deepseek_v3", "modelopt", None),
]


@pytest.mark.parametrize(("family", "layout", "base"), CASES)
def test_as_transformers(family: str, layout: str, base: str | None, tmp_path: Path) -> None:
    more = {"hidden_size": 128, "head_dim": 64} if base == "fp8" else {}
    source, target = saved(family, tmp_path / "source", **more), tmp_path / "target"
    convert(source, target, layout, base=base)
    found = run(source, target)
    assert found.activations == "bf16"
    gate = GATES.get(family, evaluated.silu_gate)
    model = evaluated.replaced(source, target, gate)
    assert bool(evaluated.Stored(target).eight_bits()) == (base is not None)
    truth = evaluated.compare(evaluated.model_of(source), model, ROWS)
    assert truth.kl > 1e-3
    check(found, truth)


def scaled(folder: Path) -> None:
    """Give each projection of each expert another input scale, that of gate not that of up."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    draw = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(("input_scale", "input_global_scale")):
            scale = 10 ** (torch.rand((), generator=draw) * 1.5 - 3.5)
            own = scale if name.endswith("input_scale") else 1 / scale
            tensors[name] = own.reshape(tensor.shape).to(tensor.dtype)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("activations", [None, "fp8", "bf16"])
@pytest.mark.parametrize(
    ("family", "layout"), [("minimax_m3_vl", "modelopt"), ("qwen3_moe", "compressed-tensors")]
)
def test_rounded_activations(
    family: str, layout: str, activations: str | None, tmp_path: Path
) -> None:
    """By default what the target says: it has input scales."""
    source, target = saved(family, tmp_path / "source"), tmp_path / "target"
    convert(source, target, layout, activations=True)
    scaled(target)
    found = run(source, target, activations=activations)
    assert found.activations == (activations or "nvfp4")
    gate, before = GATES.get(family, evaluated.silu_gate), evaluated.model_of(source)
    model = evaluated.replaced(source, target, gate, found.activations)
    truth = evaluated.compare(before, model, ROWS)
    # What the rounding is done in is float32.
    check(found, truth, 1e-6 if found.activations == "bf16" else 1e-5)
    if found.activations != "bf16":
        alone = evaluated.compare(before, evaluated.replaced(source, target, gate), ROWS)
        assert truth.depth[-1][0] / alone.depth[-1][0] > 1.005  # it is seen


def one_of(fmt: str, source: Path, folder: Path, twin: Path) -> None:
    """Write random weights for all linears of ``source`` in a format of others to ``folder``, and
    what they mean, as floats, to ``twin``."""
    encode, quantization = CONFIGS[fmt]
    config = json.loads((source / "config.json").read_text())
    floats = load_file(source / "model.safetensors")
    if fmt != "fp8":  # others keep a tensor an expert
        floats = per_expert(floats)
    stored = dict(floats)
    for name in list(linears(floats)):
        parts, weight = encode(name, tuple(stored.pop(name).shape))
        stored |= parts
        floats[name] = torch.from_numpy(weight)
    save(folder, stored, config | {"quantization_config": quantization})
    save(twin, floats, config)


@pytest.mark.parametrize("formats", [("", "fp8"), ("", "int4"), ("", "mxfp4"), ("mxfp8", "int4")])
def test_in_formats_of_others(formats: tuple[str, str], tmp_path: Path) -> None:
    """Also of two quantized ones: Transformers loads the floats that either means."""
    source = saved("qwen3_moe", tmp_path / "source", moe_intermediate_size=64)
    folders, twins = [], []
    for number, fmt in enumerate(formats):
        folders.append(tmp_path / f"quantized-{number}" if fmt else source)
        twins.append(tmp_path / f"twin-{number}" if fmt else source)
        if fmt:
            one_of(fmt, source, folders[-1], twins[-1])
    truth = evaluated.compare(*map(evaluated.model_of, twins), ROWS)
    found = run(*folders)
    check(found, truth)
    assert found.activations == "bf16"
    assert [note for note in found.notes if "differ" in note] == []


def test_of_two_nvfp4_checkpoints(tmp_path: Path) -> None:
    """One has gate and up with global scales of their own, as other tools write them."""
    source = saved("qwen3_moe", tmp_path / "source")
    targets = [tmp_path / layout for layout in LAYOUTS]
    for target in targets:
        convert(source, target, target.name, scales="mse")
    tensors = load_file(targets[0] / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("up_proj.weight_scale_2"):
            tensors[name] = tensor * 1.25
    save_file(tensors, targets[0] / "model.safetensors", {"format": "pt"})
    models = [evaluated.replaced(source, each, evaluated.silu_gate) for each in targets]
    truth = evaluated.compare(*models, ROWS)
    assert truth.kl > 1e-3
    check(run(*targets), truth)


@pytest.mark.parametrize("family", sorted(FAMILIES - NOT_RUN - SLOW))
def test_written_checkpoints_of_each_family(family: str, tmp_path: Path) -> None:
    """They run, whatever their experts are called; and to the same numbers, where the gate is
    SiLU's and the class takes weights ``[out, in]``."""
    layout = sorted(LAYOUTS)[sum(map(ord, family)) % 2]
    source = families.save(families.build(family), family, families.LAYOUTS[0], tmp_path / "source")
    target = tmp_path / "target"
    convert(source, target, layout)
    found = run(source, target)
    assert 0 < found.depth[-1].error < 0.75  # of weights in another order it is more than 1
    if family in SILU:
        model = evaluated.replaced(source, target, evaluated.silu_gate)
        check(found, evaluated.compare(evaluated.model_of(source), model, ROWS))


def test_damage_shows(tmp_path: Path) -> None:
    """Two experts exchanged; and gate and up of one."""
    source, target = saved("qwen3_moe", tmp_path / "source"), tmp_path / "target"
    convert(source, target)
    whole = run(source, target)
    tensors = load_file(target / "model.safetensors")
    for one, other in (("experts.0.", "experts.1."), ("2.gate_proj", "2.up_proj")):
        changed = {
            name.replace(one, "\0").replace(other, one).replace("\0", other): tensor
            for name, tensor in tensors.items()
        }
        save_file(changed, target / "model.safetensors", {"format": "pt"})
        damaged = run(source, target)
        assert damaged.figures.kl > 5 * whole.figures.kl
        assert damaged.depth[-1].error > 2 * whole.depth[-1].error


def test_the_same_checkpoint_loses_nothing(tmp_path: Path) -> None:
    source = saved("minimax_m3_vl", tmp_path / "source")
    found = run(source, source)
    assert found.figures.before == found.figures.after
    assert found.figures[2:7] == (0, 0, 0, 0, 1)
    assert [each.error for each in found.depth] == [0, 0]
    assert [each.experts for each in found.depth] == [False, True]


def test_one_row_has_no_error(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    figures = run(source, source, ROWS[:1]).figures
    assert (figures.kl_error, figures.change_error) == (None, None)


def test_logits_by_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of them are in memory at a time, and whether or not the class can make some."""
    source, target = saved("qwen3_moe", tmp_path / "source"), tmp_path / "target"
    convert(source, target)
    whole = run(source, target).figures
    monkeypatch.setattr(predictions, "LOGITS", 5 * 64)
    assert run(source, target).figures == pytest.approx(whole, rel=1e-12)
    sizes: list[int] = []
    plain = Qwen3MoeForCausalLM.forward

    def forward(self: Any, input_ids: Any, use_cache: Any = None) -> Any:
        found = plain(self, input_ids=input_ids, use_cache=use_cache)
        sizes.append(found.logits.shape[1])
        return found

    monkeypatch.setattr(Qwen3MoeForCausalLM, "forward", forward)
    assert run(source, target).figures == pytest.approx(whole, rel=1e-12)
    assert set(sizes) == {ROWS.shape[1]}


def test_what_is_large_is_in_memory_once(tmp_path: Path) -> None:
    source, target = saved("qwen3_moe", tmp_path / "source"), tmp_path / "target"
    convert(source, target)
    with Checkpoint(source) as first, Checkpoint(target) as second:
        sides = [Side(each, torch.device("cpu"), torch.float32) for each in (first, second)]
        share(*sides)
        with sides[0].end.loaded(), sides[1].end.loaded():
            share(*sides)
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                one, other = (side.model.model.get_parameter(name) for side in sides)
                assert one.data_ptr() == other.data_ptr()


# -- what is refused -------------------------------------------------------------------------------


def test_scales_that_nvfp4_activations_need(tmp_path: Path) -> None:
    source, target = saved("qwen3_moe", tmp_path / "source"), tmp_path / "target"
    convert(source, target)
    with pytest.raises(QuantizeError, match=r"experts\.0\.gate_proj\.weight has no input scale"):
        run(source, target, activations="nvfp4")
    with pytest.raises(QuantizeError, match="no expert is in NVFP4"):
        run(source, source, activations="nvfp4")
    convert(source, target, overwrite=True, activations=True)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in tensors if name.endswith("1.mlp.experts.2.up_proj.input_scale"))
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantizeError, match=r"the input scale of .*2\.up_proj\.weight is 0"):
        run(source, target)
    run(source, target, activations="bf16")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"num_hidden_layers": 3}, r"layers: 3, and 2 in"),
        ({"vocab_size": 80}, r"vocabulary: 80, and 64 in"),
        ({"hidden_size": 64}, r"hidden size: 64, and 32 in"),
        (
            {"num_experts": 8, "num_local_experts": 8},
            r"experts of layer 0: \(8, 32, 48\), and \(4, 32, 48\) in",
        ),
        ({"mlp_only_layers": [0]}, r"layers with experts: \[1\], and \[0, 1\] in"),
    ],
)
def test_another_model(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    other = saved("qwen3_moe", tmp_path / "other", **more)
    with pytest.raises(QuantizeError, match=says) as error:
        run(source, other)
    assert "give the one that it was made of" in str(error.value)


def test_configs_that_differ_are_named(tmp_path: Path) -> None:
    source, target = saved("qwen3_moe", tmp_path / "source"), tmp_path / "target"
    convert(source, target)
    assert run(source, target).notes == ()
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    (note,) = run(source, target).notes
    assert "the two config.json differ in rms_norm_eps;" in note


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    source, target = saved("qwen3_moe", tmp_path / "source"), tmp_path / "target"
    convert(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.down_proj.weight_scale_2"] *= torch.nan
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantizeError, match=r"target: layer 1 makes NaN or infinite") as error:
        run(source, target)
    assert "calibrat" not in str(error.value)


@pytest.mark.parametrize("which", ["source", "target"])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_end_is_named(which: str, name: str, value: float, tmp_path: Path) -> None:
    """What makes the logits is read when all layers are done, and no layer returns it."""
    source = saved("qwen3_moe", tmp_path / "source")
    convert(source, tmp_path / "target")
    damaged = tmp_path / which
    tensors = load_file(damaged / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    says = f"{re.escape(str(damaged))}: .* its norm and head, makes NaN"
    with pytest.raises(QuantizeError, match=says):
        run(source, tmp_path / "target")


def test_what_has_lost_everything_has_figures(tmp_path: Path) -> None:
    """Perplexity may be larger than any float."""
    source = saved("qwen3_moe", tmp_path / "source")
    convert(source, tmp_path / "target")
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    tensors["lm_head.weight"] *= 1e6
    save_file(tensors, tmp_path / "target" / "model.safetensors", {"format": "pt"})
    figures = run(source, tmp_path / "target").figures
    assert figures.after == figures.change == math.inf
    assert 1e3 < figures.kl < math.inf and figures.kl_error is not None
    impossible = [predictions.Row(10.0, math.inf, math.inf, 1, 5), predictions.Row(9.0, 9, 1, 4, 5)]
    figures = predictions.figures_of(impossible)
    assert figures.before == pytest.approx(math.exp(1.9))
    assert (figures.after, figures.kl) == (math.inf, math.inf)
    assert (figures.change_error, figures.kl_error) == (None, None)


def test_what_is_not_rounded_is_said(tmp_path: Path) -> None:
    """Scales of keys and values, and quantized linears beside the experts."""
    source, target = saved("minimax_m3_vl", tmp_path / "source"), tmp_path / "target"
    convert(source, target, base="mxfp8", activations=True)
    tensors = load_file(target / "model.safetensors")
    others = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    count = sum(name.endswith("weight_scale") for name in others)
    name = next(name for name in tensors if name.endswith("k_proj.weight"))
    tensors[name.replace("weight", "k_scale")] = torch.tensor(0.5)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    cache, beside = run(source, target).notes
    assert "key-value cache are ignored" in cache
    assert beside.startswith(f"{count} quantized linears beside the experts")
