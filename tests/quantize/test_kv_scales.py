"""``--kv-cache fp8`` with a text: the scales of keys and values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from tests.quantize.test_cli import run

Folders = Callable[[str], Path]
NAMES = {
    "modelopt": ("k_proj.k_scale", "v_proj.v_scale"),
    "compressed-tensors": ("k_scale", "v_scale"),
}
TOKENS = torch.randint(3, 32, (3, 24), generator=torch.Generator().manual_seed(2))


def convert(source: Path, target: Path, layout: str, method: str | None, **more: Any) -> Path:
    settings = Calibration("text", *TOKENS.shape, "digest", method)
    options = Options(layout=layout, kv_cache="fp8", kv_scales=True, calibration=settings, **more)
    with Checkpoint(source) as checkpoint:
        execute(checkpoint, plan(checkpoint, options), target, samples=TOKENS)
    return target


def cached(source: Path) -> list[tuple[float, float]]:
    """The largest keys and values in Transformers' own cache, by layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
    layers = cache.layers
    return [(float(one.keys.abs().max()), float(one.values.abs().max())) for one in layers]


@pytest.mark.parametrize(
    ("family", "layout", "method"),
    [
        ("qwen3_moe", "modelopt", None),
        ("qwen3_moe", "compressed-tensors", "gptq"),
        ("minimax_m3", "modelopt", "two-sided"),
        ("minimax_m3", "compressed-tensors", None),
    ],
)
def test_they_cover_what_the_cache_holds(
    family: str, layout: str, method: str | None, saved: Folders, tmp_path: Path
) -> None:
    source = saved(family)
    out = convert(source, tmp_path / "out", layout, method)
    stored = load_file(out / "model.safetensors")
    largest = cached(source)
    assert len(largest) == 2
    for layer, pair in enumerate(largest):
        for name, truth in zip(NAMES[layout], pair, strict=True):
            scale = stored[f"model.layers.{layer}.self_attn.{name}"]
            assert scale.dtype == torch.float32
            assert scale.shape == (() if layout == "modelopt" else (1,))
            assert float(scale) == pytest.approx(2 * truth / 448, rel=1e-3)
    for words in ((source, out), (out,)):
        found = run("verify", *words)
        assert "No problems found" in found.output


def test_latent_attention_has_none(saved: Folders, tmp_path: Path) -> None:
    """Its cache holds the latent, of which nobody has seen the range."""
    out = convert(saved("deepseek_v3"), tmp_path / "out", "modelopt", None)
    assert not [name for name in load_file(out / "model.safetensors") if "_scale" in name[-8:]
                and name.rpartition(".")[2] in ("k_scale", "v_scale")]  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8


def test_vllm_finds_each_under_its_name() -> None:
    from vllm.model_executor.model_loader.weight_utils import maybe_remap_kv_scale_name

    attention = "model.layers.0.self_attn"
    parameters = {f"{attention}.attn.{name}": 0 for name in ("k_scale", "v_scale")}
    for names in NAMES.values():
        found = [maybe_remap_kv_scale_name(f"{attention}.{name}", parameters) for name in names]
        assert found == list(parameters)


@pytest.mark.parametrize("change", ["value", "zero", "gone", "report"])
def test_verify_finds_damage(change: str, saved: Folders, tmp_path: Path) -> None:
    source = saved("qwen3_moe")
    out = convert(source, tmp_path / "out", "modelopt", None)
    file, name = out / "model.safetensors", "model.layers.1.self_attn.v_proj.v_scale"
    tensors = load_file(file)
    if change == "report":
        data = json.loads((out / "nvfp4_moe_report.json").read_text())
        del data["kv_scales"]["model.layers.1.self_attn"]
        (out / "nvfp4_moe_report.json").write_text(json.dumps(data))
    elif change == "gone":
        del tensors[name]
    else:
        tensors[name] = tensors[name] * (0 if change == "zero" else 1.001)
    save_file(tensors, file, {"format": "pt"})
    for words in ((source, out), (out,)):
        found = run("verify", *words)
        assert found.exit_code == 1
        assert ("keys and values" if change == "report" else name) in found.output


def test_resumed_they_are_the_same(
    saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops after its first layer goes on with what that layer's cache held."""
    from quantize.calibration.progress import CalibrationProgress

    source = saved("qwen3_moe")
    whole = convert(source, tmp_path / "whole", "modelopt", None)
    finish = CalibrationProgress.finish_step

    def stop(self: CalibrationProgress, *args: Any) -> None:
        finish(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationProgress, "finish_step", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "half", "modelopt", None)
    settings = Calibration("text", *TOKENS.shape, "digest", None)
    options = Options(kv_cache="fp8", kv_scales=True, calibration=settings)
    with Checkpoint(source) as checkpoint:
        execute(
            checkpoint, plan(checkpoint, options), tmp_path / "half", samples=TOKENS, resume=True
        )
    same = (tmp_path / "half/model.safetensors").read_bytes()
    assert same == (whole / "model.safetensors").read_bytes()
    shutil.rmtree(whole)
