"""The MiniMax-M3 that benchmarks serve has the names, shapes and config of the real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.m3_checkpoint import STD, Model, write
from quantize.run.report_files import REPORT_DATA
from tests.hub_layout import publish
from tests.plugin.reference import dequantize
from tests.quantize import checkpoints

NANO = {"experts": 32, "hidden": 384, "intermediate": 128, "heads": 4, "kv_heads": 2}


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each tensor, read by safetensors itself."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def test_names_are_those_of_a_published_model(tmp_path: Path) -> None:
    """Of m3-nano's sizes, in names that vLLM's native model was seen to read; the dense first layer
    is left out."""
    hub = publish(checkpoints.save_m3_nano(tmp_path / "nano", 6), tmp_path / "hub")
    write(tmp_path / "mine", 5, quantized=False, **NANO)
    theirs = {
        re.sub(r"layers\.(\d)", lambda m: f"layers.{int(m[1]) - 1}", name): what
        for name, what in stored(hub).items()
        if "layers.0." not in name
    }
    assert stored(tmp_path / "mine") == theirs
    mine, nano = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "mine", hub))
    assert mine.keys() == nano.keys()
    # swiglu_beta and others are left to the class's defaults in both.
    assert mine["text_config"].keys() == nano["text_config"].keys()


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_a_quantized_one_is_as_the_quantizer_writes_it(tmp_path: Path, layout: str) -> None:
    sizes = NANO | {"experts": 4, "vocabulary": 64}
    write(tmp_path / "bf16", 2, quantized=False, **sizes)
    checkpoints.convert(tmp_path / "bf16", tmp_path / "real", layout)
    write(tmp_path / "random", 2, layout=layout, **sizes)
    assert stored(tmp_path / "random") == stored(tmp_path / "real")
    for file in (tmp_path / "real").glob("*.json"):
        if "index" not in file.name and file.name != REPORT_DATA:
            assert json.loads((tmp_path / "random" / file.name).read_text()) == json.loads(
                file.read_text()
            )


def test_numbers_are_a_models(tmp_path: Path) -> None:
    write(tmp_path, 1, **NANO)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as handle:
        base = "model.layers.0.block_sparse_moe.experts"
        weights = [
            dequantize(*(handle.get_tensor(f"{base}.{e}.{name}.weight{suffix}")
                         for suffix in ("", "_scale", "_scale_2")))
            for e in (0, 31) for name in ("w1", "w2", "w3")
        ]  # fmt: skip
        query = handle.get_tensor("model.layers.0.self_attn.q_proj.weight").float()
    for one in weights:
        assert one.std().item() == pytest.approx(STD, rel=0.03)
        assert abs(one.mean().item()) < STD / 20
    assert not torch.equal(weights[0], weights[2])
    assert query.std().item() == pytest.approx(STD, rel=0.1)


def test_five_layers_are_at_least_sixteen_gib() -> None:
    model = Model(layers=5)
    experts = [out for out in model.tensors() if ".experts." in out.name]
    assert sum(out.nbytes for out in experts) == 5 * 128 * 3 * 6144 * 3072 * 2
    assert 5 * model.quantized_layer_bytes == 5 * 128 * 3 * 6144 * 3072 * 9 // 16
    assert 5 * model.quantized_layer_bytes > 16 * 2**30
