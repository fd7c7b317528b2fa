"""``--base``: linears beside the experts in FP8 or MXFP8. Bits, configs, readers, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.layouts import LAYOUTS
from quantize.layouts.base import BASES
from tests.quantize import checkpoints, reference
from tests.quantize.test_cli import refusal, run

SIZES = {
    "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32,
}  # fmt: skip
LINEARS = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"]
EXPERT = "model.layers.0.mlp.experts.0.gate_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE whose attention has whole blocks of 128, with weights of all magnitudes, and
    a block of zeros."""
    model = checkpoints.build("qwen3_moe", **SIZES)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "_proj" in name and "self_attn" in name:
            exponent = torch.rand(weight.shape, generator=generator) * 8 - 6
            weight.data *= torch.pow(2, exponent)
    model.get_parameter("model.layers.1.self_attn.o_proj.weight").data[:, 32:64] = 0
    folder = tmp_path_factory.mktemp("base") / "source"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folders = {}
    for layout in LAYOUTS:
        for base in BASES:
            folder = tmp_path_factory.mktemp(layout) / base
            done = run("quantize", source, folder, "--layout", layout, "--base", base)
            assert done.exit_code == 0, done.output
            folders[layout, base] = folder
    return folders


each = pytest.mark.parametrize(
    ("layout", "base"), [(layout, base) for layout in LAYOUTS for base in BASES]
)
Made = dict[tuple[str, str], Path]


def blocks(weight: np.ndarray, base: str) -> np.ndarray:
    """``[blocks, values of a block]``, in the order of the scales."""
    rows, columns = weight.shape
    if base == "mxfp8":
        return weight.reshape(-1, 32)
    grid = weight.reshape(rows // 128, 128, columns // 128, 128)
    return grid.transpose(0, 2, 1, 3).reshape(-1, 128 * 128)


@each
def test_bits_are_those_of_the_definition(layout: str, base: str, source: Path, made: Made) -> None:
    """Scales by exact arithmetic on powers of two, or one division; codes are the nearest E4M3."""
    original = load_file(source / "model.safetensors")
    stored = load_file(made[layout, base] / "model.safetensors")
    for module in LINEARS:
        weight = blocks(original[f"{module}.weight"].double().numpy(), base)
        codes, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"]
        assert codes.dtype == torch.float8_e4m3fn
        amax = np.abs(weight).max(1)
        if base == "fp8":
            assert scale.shape == ((1, 1, 1, 1) if layout == "modelopt" else (1, 1))
            wanted = amax.astype(np.float32) / np.float32(448)
            scales = scale.flatten().numpy()
            assert (scales == np.where(wanted > 0, wanted, 1)).all()
        else:
            assert scale.shape == (codes.shape[0], codes.shape[1] // 32)
            assert scale.dtype == torch.uint8
            scales = 2.0 ** (scale.flatten().numpy().astype(float) - 127)
            assert (amax <= 448 * scales).all()
            assert (amax[amax > 0] > 224 * scales[amax > 0]).all()  # half would clip
        if base == "fp8":  # a division, rounded once to float32
            ratio = weight.astype(np.float32) / scales[:, None]
        else:
            ratio = weight / scales[:, None]
        # The reference is for scales, which are not zero.
        nearest = np.where(np.abs(ratio) > 2.0**-10, reference.nearest_e4m3(np.abs(ratio)), 0)
        bits = blocks(codes.view(torch.uint8).numpy(), base)
        assert (bits & 127 == nearest).all()
        assert (bits[nearest > 0] >> 7 == np.signbit(ratio[nearest > 0])).all()
    copied = [name for name in original if "experts" not in name and name[:-7] not in LINEARS]
    assert copied
    assert all(torch.equal(original[name], stored[name]) for name in copied)


@each
def test_our_own_reader_gives_the_same_weights(
    layout: str, base: str, source: Path, made: Made
) -> None:
    """A checkpoint with such linears can be a source."""
    original = load_file(source / "model.safetensors")
    with Checkpoint(made[layout, base]) as checkpoint:
        for module in LINEARS:
            weight = original[f"{module}.weight"].double()
            lost = checkpoint.load(f"{module}.weight").double() - weight
            assert 0.01 < lost.norm() / weight.norm() < 0.04


@pytest.mark.parametrize("base", BASES)
def test_the_library_reads_and_applies_it(base: str, source: Path, made: Made) -> None:
    folder = made["compressed-tensors", base]
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(stored)
    model = torch.nn.Module()
    tensors = load_file(source / "model.safetensors")
    paths = [*LINEARS, EXPERT, "lm_head", "model.layers.0.mlp.gate"]
    for path in paths:
        parent = model
        *parents, last = path.split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        rows, columns = tensors[f"{path}.weight"].shape
        parent.add_module(last, torch.nn.Linear(columns, rows, bias=False))
    apply_quantization_config(model, config)
    found = {
        path: getattr(model.get_submodule(path), "quantization_scheme", None) for path in paths
    }
    assert {path: scheme and scheme.weights.num_bits for path, scheme in found.items()} == {
        **dict.fromkeys(LINEARS, 8), EXPERT: 4, "lm_head": None, "model.layers.0.mlp.gate": None
    }  # fmt: skip
    out = load_file(folder / "model.safetensors")
    for path in LINEARS:
        scheme = found[path]
        assert scheme is not None
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        state = {n.removeprefix(f"{path}."): t for n, t in out.items() if n.startswith(f"{path}.")}
        assert set(state) == set(compressor.compression_param_names(scheme))
        weight = compressor.decompress(state, scheme)["weight"].double()
        truth = tensors[f"{path}.weight"].double()
        assert 0.01 < (weight - truth).norm() / truth.norm() < 0.04


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_vllm_resolves_each_module_of_modelopts(base: str, file: str, made: Made) -> None:
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig

    stored = json.loads((made["modelopt", base] / file).read_text())
    stored = stored.get("quantization_config", stored)
    named = {"quant_method": "modelopt"} | stored
    override = ModelOptMixedPrecisionConfig.override_quantization_method
    assert override(named, None) == "modelopt_mixed"
    config = ModelOptMixedPrecisionConfig.from_config(stored)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    wanted = {"fp8": "FP8_PB_WO", "mxfp8": "MXFP8"}[base]
    for module in (*LINEARS, "model.layers.1.self_attn.qkv_proj"):
        assert config._resolve_quant_algo(module) == wanted
        assert not config.is_layer_excluded(module)
    assert config._resolve_quant_algo("model.layers.0.mlp.experts") == "W4A16_NVFP4"
    assert config.is_layer_excluded("lm_head")
    assert config.is_layer_excluded("model.layers.0.mlp.gate")


@each
def test_vllm_where_keys_are_the_values(
    layout: str, base: str, source: Path, tmp_path: Path
) -> None:
    """No v_proj, as in Gemma 4's full attention; vLLM fuses one with query and key all the same."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig

    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    config = json.loads((source / "config.json").read_text())
    checkpoints.save(tmp_path / "source", tensors, config)
    checkpoints.convert(tmp_path / "source", tmp_path / "out", layout, base=base)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    attention = [f"model.layers.{i}.self_attn.qkv_proj" for i in range(2)]
    stock: Any = (
        ModelOptMixedPrecisionConfig if layout == "modelopt" else CompressedTensorsConfig
    ).from_config(stored)
    stock.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    for module in attention:
        if layout == "modelopt":
            assert stock._resolve_quant_algo(module) == {"fp8": "FP8_PB_WO", "mxfp8": "MXFP8"}[base]
            assert not stock.is_layer_excluded(module)
        else:
            scheme = stock.get_scheme_dict(torch.nn.Linear(1, 1), module)
            assert scheme is not None and scheme["weights"].num_bits == 8
    assert run("verify", tmp_path / "source", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(("flag", "algorithm"), [((), None), (("--kv-cache", "fp8"), "FP8")])
def test_the_cache_that_vllm_is_asked_for(
    flag: tuple[str, ...], algorithm: str | None, source: Path, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    for layout, name in (("modelopt", "modelopt_fp4"), ("compressed-tensors",) * 2):
        folder = tmp_path / layout
        assert run("quantize", source, folder, "--layout", layout, *flag).exit_code == 0
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        config: Any = get_quantization_config(name).from_config(stored)
        if layout == "modelopt":
            assert config.kv_cache_quant_algo == algorithm
            older = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
            assert older["kv_cache_quant_algo"] == algorithm
        else:
            scheme = config.kv_cache_scheme
            assert (scheme and (scheme["num_bits"], scheme["type"])) == (
                (flag and (8, "float")) or None
            )
        assert run("verify", source, folder).exit_code == 0


# -- what is chosen --------------------------------------------------------------------------------


def test_linears_that_engines_fuse_stay_together(source: Path, tmp_path: Path) -> None:
    """A key projection of 136 rows has no whole blocks of 128, so that query and value stay too."""
    model = tmp_path / "model"
    shutil.copytree(source, model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert run("quantize", model, tmp_path / "out", "--base", "fp8").exit_code == 0
    stored = load_file(tmp_path / "out/model.safetensors")
    kinds = {m: stored[f"{m}.weight"].dtype for m in LINEARS[:4]}
    assert list(kinds.values()) == [torch.bfloat16] * 3 + [torch.float8_e4m3fn]
    assert run("verify", model, tmp_path / "out").exit_code == 0
    listed = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert {*LINEARS[:3]} <= {*listed["exclude_modules"]}


def test_patterns_choose_among_them(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = "--exclude", "*.layers.1.self_attn.*", "--exclude", "*.layers.0.mlp.*"
    assert run("quantize", source, out, "--base", "mxfp8", *more).exit_code == 0
    stored = load_file(out / "model.safetensors")
    eight = {n for n, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {n.removesuffix(".weight") for n in eight if n.endswith(".weight")} == {*LINEARS[:4]}
    assert run("verify", source, out).exit_code == 0


def test_refusals(source: Path, saved: Callable[[str], Path], tmp_path: Path) -> None:
    assert "leave one out" in refusal(
        "quantize", source, tmp_path / "a", "--base", "fp8", "--all-linears", code=2
    )
    said = refusal("quantize", saved("qwen3_moe"), tmp_path / "b", "--base", "fp8")
    assert "--base fp8: no linears besides the experts" in said
    assert "in whole blocks (fp8: 128 x 128 weights" in said  # there is attention, but too small
    assert not (tmp_path / "b").exists()


def test_damaged_weights_are_named(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(source, model)
    tensors = load_file(model / "model.safetensors")
    tensors[f"{LINEARS[5]}.weight"][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    said = refusal("quantize", model, tmp_path / "out", "--base", "fp8")
    assert f"model.safetensors: {LINEARS[5]}.weight holds NaN" in said
    assert said.endswith("get it again, and go on with --resume")
    assert not (tmp_path / "out/config.json").exists()


# -- verify and the report -------------------------------------------------------------------------


@each
def test_verify(layout: str, base: str, source: Path, made: Made) -> None:
    for words in ((source, made[layout, base]), (made[layout, base],)):
        assert "No problems found" in run("verify", *words).output


def flip(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(torch.uint8).view(-1)[5 % tensors[name].view(torch.uint8).numel()] ^= 1


DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = {
    "one code": ("weight", lambda t: flip(t, f"{LINEARS[3]}.weight")),
    "one scale": ("weight_scale", lambda t: flip(t, f"{LINEARS[3]}.weight_scale")),
    "a scale is gone": ("missing", lambda t: t.pop(f"{LINEARS[3]}.weight_scale")),
    "another dtype": (
        "BF16", lambda t: t.update({f"{LINEARS[3]}.weight": t[f"{LINEARS[3]}.weight"].bfloat16()})
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@each
def test_damage_is_found(
    layout: str, base: str, damage: str, source: Path, made: Made, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(made[layout, base], folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    said, change = DAMAGES[damage]
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    found = run("verify", source, folder)
    assert found.exit_code == 1
    assert any(LINEARS[3] in line and said in line for line in found.output.split("problem: "))


@pytest.mark.parametrize("base", BASES)
def test_a_config_that_says_otherwise(base: str, source: Path, made: Made, tmp_path: Path) -> None:
    """Each of these makes an engine read other numbers, or none."""
    for number, change in enumerate((
        lambda q: q["quantized_layers"].pop(LINEARS[3]),
        lambda q: q["quantized_layers"][LINEARS[3]].update(quant_algo="FP8"),
        lambda q: q["ignore"].append(LINEARS[3]),
        lambda q: q.update(quant_algo="NVFP4"),
        lambda q: q.update(kv_cache_scheme={"num_bits": 8, "type": "float"}),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        shutil.copytree(made["modelopt", base], folder)
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        for words in ((source, folder), (folder,)):
            found = run("verify", *words)
            assert found.exit_code == 1
            assert "config.json" in found.output


def test_the_report_has_them(made: Made) -> None:
    folder = made["modelopt", "mxfp8"]
    base = json.loads((folder / "nvfp4_moe_report.json").read_text())["base"]
    assert base["format"] == "mxfp8"
    assert sorted(base["names"]) == sorted(LINEARS)
    assert all(0.01 < error < 0.04 for error in base["errors"])
    assert base["bytes_before"] == 8 * 128 * 128 * 2
    assert base["bytes_after"] == 8 * 128 * (128 + 4)
    page = (folder / "nvfp4_moe_report.html").read_text()
    assert "8 linears in MXFP8" in page
    assert "linears in MXFP8" in page


def test_verify_finds_mx_scales_that_are_nan(made: Made, tmp_path: Path) -> None:
    """The byte 255, with the source and without it."""
    out = Path(shutil.copytree(made["modelopt", "mxfp8"], tmp_path / "out"))
    tensors = load_file(out / "model.safetensors")
    tensors[f"{LINEARS[4]}.weight_scale"][1, 0] = 255
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    done = run("verify", out)
    assert done.exit_code == 1
    assert f"{LINEARS[4]}.weight_scale holds NaN" in " ".join(done.output.split())
