"""A source's key-value cache in the words of the target's layout, with the source's scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.run.kv_scales import outputs_of
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize.checkpoints import convert
from tests.quantize.kv_sources import (
    ARGS,
    ATTENTION,
    DIRECT,
    HEADS,
    MODELOPT,
    SCALES,
    WAYS,
    Way,
    save_source,
)
from tests.quantize.test_cli import run

NAMES = {"modelopt": ("k_proj.k_scale", "v_proj.v_scale"), "compressed-tensors": DIRECT}
SHAPES: dict[str, tuple[int, ...]] = {"modelopt": (), "compressed-tensors": (1,)}
NVFP4 = Way("modelopt", {"kv_cache_quant_algo": "NVFP4"})
PER_HEAD = Way("compressed-tensors", {"kv_cache_scheme": ARGS | {"strategy": "attn_head"}},
               None, DIRECT, torch.bfloat16)  # fmt: skip
INT8 = Way("compressed-tensors", {"kv_cache_scheme": ARGS | {"type": "int"}}, None, DIRECT)
ASYMMETRIC = Way(
    "compressed-tensors", {"kv_cache_scheme": ARGS | {"symmetric": False}}, None, DIRECT
)
NEVER_SAID = Way("modelopt")


def cache_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that may be scales of a cache, whatever they are called."""
    ends = ("k_scale", "v_scale", "output_scale", "kv_scale", "zero_point")
    return {n: t for n, t in load_file(folder / "model.safetensors").items() if n.endswith(ends)}


def said(folder: Path, layout: str) -> Any:
    """The cache that the target asks for, in each place where it says it."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if layout == "modelopt":
        older = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
        return config.get("kv_cache_scheme"), older["kv_cache_quant_algo"]
    scheme = QuantizationConfig.model_validate(config).kv_cache_scheme
    words = scheme.model_dump(mode="json") if scheme else {}
    return tuple(words[key] for key in ("num_bits", "type", "strategy")) if scheme else None


def verified(source: Path, target: Path) -> None:
    for words in ((source, target), (target,)):
        found = run("verify", *words)
        assert found.exit_code == 0, found.output


FP8 = {"modelopt": (MODELOPT, "FP8"), "compressed-tensors": (8, "float", "tensor")}
NOTHING = {"modelopt": (None, None), "compressed-tensors": None}


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_from_every_tool_to_both_layouts(way: str, layout: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", WAYS[way])
    out = tmp_path / "out"
    done = run("quantize", source, out, "--layout", layout)
    assert done.exit_code == 0, done.output
    assert "scales of 2 attentions. Carried over." in done.output
    assert said(out, layout) == FP8[layout]
    stored = cache_tensors(out)
    assert stored.keys() == {f"{a}.{name}" for a in ATTENTION for name in NAMES[layout]}
    for attention, pair in zip(ATTENTION, SCALES, strict=True):
        for name, scale in zip(NAMES[layout], pair, strict=True):
            found = stored[f"{attention}.{name}"]
            assert (found.dtype, tuple(found.shape)) == (torch.float32, SHAPES[layout])
            assert float(found) == scale
    report = json.loads((out / "nvfp4_moe_report.json").read_text())
    assert report["kv_scales"] == {a: list(s) for a, s in zip(ATTENTION, SCALES, strict=True)}
    verified(source, out)


@pytest.mark.parametrize(("way", "layout"), [("modelopt", "compressed-tensors"),
                                             ("compressed-tensors", "modelopt")])  # fmt: skip
def test_without_scales(way: str, layout: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", WAYS[way], scales=False)
    convert(source, tmp_path / "out", layout=layout)
    assert said(tmp_path / "out", layout) == FP8[layout]
    assert cache_tensors(tmp_path / "out") == {}
    verified(source, tmp_path / "out")


def test_one_scale_for_both(tmp_path: Path) -> None:
    """As vLLM's older checkpoints have it."""
    source = save_source(tmp_path / "source", Way("modelopt", WAYS["modelopt"].config, None,
                                                  ("kv_scale",)))  # fmt: skip
    convert(source, tmp_path / "out", layout="compressed-tensors")
    stored = cache_tensors(tmp_path / "out")
    assert {n: float(t) for n, t in stored.items()} == {
        f"{a}.{n}": pair[0] for a, pair in zip(ATTENTION, SCALES, strict=True) for n in DIRECT
    }
    verified(source, tmp_path / "out")


@pytest.mark.parametrize("layout", NAMES)
def test_what_nothing_describes_may_be_weights(layout: str, tmp_path: Path) -> None:
    """So it is copied byte for byte, as all else is."""
    for name, way in (("numbers", NEVER_SAID), ("vectors", NEVER_SAID._replace(names=DIRECT))):
        source = save_source(tmp_path / name, way, heads=name == "vectors")
        done = run("quantize", source, tmp_path / f"{name}-out", "--layout", layout)
        assert "key-value cache" not in done.output
        assert said(tmp_path / f"{name}-out", layout) == NOTHING[layout]
        stored, truth = cache_tensors(tmp_path / f"{name}-out"), cache_tensors(source)
        assert len(truth) == 4
        assert stored.keys() == truth.keys()
        assert all(torch.equal(stored[key], tensor) for key, tensor in truth.items())
        verified(source, tmp_path / f"{name}-out")


def test_a_scale_for_each_head(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", PER_HEAD, heads=True)
    convert(source, tmp_path / "out", layout="compressed-tensors")
    assert said(tmp_path / "out", "compressed-tensors") == (8, "float", "attn_head")
    stored = cache_tensors(tmp_path / "out")
    for attention, pair in zip(ATTENTION, SCALES, strict=True):
        for name, scale, heads in zip(DIRECT, pair, HEADS, strict=True):
            found = stored[f"{attention}.{name}"]
            assert found.dtype == torch.float32
            assert found.flatten().tolist() == [head * scale for head in heads]
    verified(source, tmp_path / "out")


def test_nvfp4_caches_stay_in_modelopts_words(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", NVFP4)
    convert(source, tmp_path / "out")
    scheme = {"dynamic": False, "num_bits": 4, "type": "float"}
    assert said(tmp_path / "out", "modelopt") == (scheme, "NVFP4")
    assert len(cache_tensors(tmp_path / "out")) == 4
    verified(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("way", "layout", "key", "heads"),
    [
        (NVFP4, "compressed-tensors", "quantization_config.kv_cache_quant_algo", False),
        (PER_HEAD, "modelopt", "quantization_config.kv_cache_scheme", True),
        (INT8, "compressed-tensors", "quantization_config.kv_cache_scheme", False),
        (INT8, "modelopt", "quantization_config.kv_cache_scheme", False),
        (ASYMMETRIC, "compressed-tensors", "quantization_config.kv_cache_scheme", False),
    ],
)
def test_what_cannot_be_said(way: Way, layout: str, key: str, heads: bool, tmp_path: Path) -> None:
    """A warning names the key; its scales go too, since they are of something else."""
    source = save_source(tmp_path / "source", way, heads=heads)
    done = run("quantize", source, tmp_path / "out", "--layout", layout)
    assert done.exit_code == 0, done.output
    assert "Warning: The source's key-value cache: config.json: " + key in done.output
    assert f"--layout {layout} cannot say that" in done.output
    assert said(tmp_path / "out", layout) == NOTHING[layout]
    assert cache_tensors(tmp_path / "out") == {}
    verified(source, tmp_path / "out")
    assert key in run("verify", source, tmp_path / "out").output


@pytest.mark.parametrize("layout", NAMES)
def test_what_the_user_says_wins(layout: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", WAYS["modelopt"])
    done = run("quantize", source, tmp_path / "auto", "--layout", layout, "--kv-cache", "auto")
    assert "--kv-cache auto: left out." in done.output
    assert said(tmp_path / "auto", layout) == NOTHING[layout]
    assert cache_tensors(tmp_path / "auto") == {}
    verified(source, tmp_path / "auto")
    other = save_source(tmp_path / "other", NVFP4)
    done = run("quantize", other, tmp_path / "fp8", "--layout", layout, "--kv-cache", "fp8")
    assert "--kv-cache fp8: said instead, and engines take scales of 1." in done.output
    assert said(tmp_path / "fp8", layout) == FP8[layout]
    assert cache_tensors(tmp_path / "fp8") == {}
    verified(other, tmp_path / "fp8")
    same = run("quantize", source, tmp_path / "same", "--layout", layout, "--kv-cache", "fp8")
    assert "key-value cache" not in same.output
    assert len(cache_tensors(tmp_path / "same")) == 4
    verified(source, tmp_path / "same")


def test_scales_found_anew(tmp_path: Path) -> None:
    """Under the same names as the source's, which stay out."""
    source = save_source(tmp_path / "source", WAYS["only the cache"])
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, Options(kv_cache="fp8", kv_scales=True))
    assert any("found anew" in note for note in steps.notes)
    assert steps.caches == ATTENTION
    assert steps.carried_caches == []


def test_inspect_says_it(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", WAYS["compressed-tensors"])
    found = json.loads(run("inspect", source, "--json").output)
    assert found["kv_cache"] == "fp8"
    assert any("config.json: quantization_config.kv_cache_scheme" in n for n in found["notes"])
    assert (
        json.loads(run("inspect", source, "--json", "--kv-cache", "auto").output)["kv_cache"]
        is None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("alone", "model.layers.1.self_attn has no scale of its values"),
        ("many", "v_proj.v_scale is F32 [2], expected one float"),
        ("codes", "v_proj.v_scale is I64 [], expected one float"),
        ("zero", "v_proj.v_scale is [0.0], no scale that keys and values can have"),
        ("nan", "v_proj.v_scale is [nan], no scale that keys and values can have"),
    ],
)
def test_bad_scales(change: str, message: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", WAYS["modelopt"])
    file, name = source / "model.safetensors", f"{ATTENTION[1]}.v_proj.v_scale"
    tensors = load_file(file)
    values = {"many": [1.0, 2.0], "codes": 3, "zero": 0.0, "nan": float("nan")}
    if change == "alone":
        del tensors[name]
    else:
        tensors[name] = torch.tensor(values[change])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(QuantizeError) as error:
        convert(source, tmp_path / "out", layout="compressed-tensors")
    assert message in str(error.value)
    assert "--kv-cache auto" in str(error.value)
    assert not (tmp_path / "out" / "config.json").exists()
    convert(source, tmp_path / "auto", layout="compressed-tensors", kv_cache="auto")


@pytest.mark.parametrize("change", ["value", "gone", "kept", "config"])
@pytest.mark.parametrize("layout", NAMES)
def test_verify_finds_damage(change: str, layout: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", WAYS["modelopt"])
    out = tmp_path / "out"
    convert(source, out, layout=layout)
    file, name = out / "model.safetensors", f"{ATTENTION[1]}.{NAMES[layout][1]}"
    tensors = load_file(file)
    if change == "value":
        tensors[name] *= 1.001
    elif change == "gone":
        del tensors[name]
    elif change == "kept":
        name = f"{ATTENTION[0]}.kv_scale"
        tensors[name] = torch.tensor(1.0)
    else:
        name = "kv_cache_scheme"
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"].pop("kv_cache_scheme")
        (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, file, {"format": "pt"})
    for words in ((source, out), (out,)):
        found = run("verify", *words)
        assert found.exit_code == 1
        alone = len(words) == 1 and change == "kept"  # all that its size tells
        assert ("bytes_after" if alone else name) in found.output


def test_verify_compares_with_the_source(tmp_path: Path) -> None:
    """Not only with the report, which may be as wrong."""
    source = save_source(tmp_path / "source", WAYS["modelopt"])
    convert(source, tmp_path / "out", layout="compressed-tensors")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{ATTENTION[0]}.k_proj.k_scale"] *= 2
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    found = run("verify", source, tmp_path / "out")
    assert found.exit_code == 1
    assert f"{ATTENTION[0]}.k_scale is 0.0273438, but the source has [0.0546875]" in found.output


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize(
    ("attention", "latent", "keys"),
    [
        ("model.layers.0.self_attn", True, "k_proj.k_scale"),
        ("backbone.layers.0.mixer", False, None),
        ("model.layers.0.attention", False, "k_scale"),
    ],
)
def test_names_by_kind_of_attention(
    attention: str, latent: bool, keys: str | None, layout: str
) -> None:
    """Latent attention has ModelOpt's names alone, and these are read below some modules alone."""
    found = outputs_of(attention, layout, latent=latent)[0].name
    assert found == f"{attention}.{keys or NAMES[layout][0]}"
