"""From a quantized checkpoint to NVFP4: as from the floats that its weights mean."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.quantize.checkpoints import build, convert, save
from tests.quantize.published_integers import integers
from tests.quantize.stored_formats import (
    E4M3,
    compressed_tensors_group,
    e2m1_pairs,
    e4m3,
    e8m0,
    product,
    random_bytes,
    spread,
    tensor,
)

Stored = dict[str, torch.Tensor]
Encode = Callable[[str, tuple[int, ...]], tuple[Stored, np.ndarray]]

BLOCK = (32, 16)


def finite_codes(*shape: int) -> np.ndarray:
    codes = random_bytes(*shape)
    return np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)


def fp8(name: str, shape: tuple[int, ...]) -> tuple[Stored, np.ndarray]:
    codes = finite_codes(*shape)
    grid = (*shape[:-2], -(-shape[-2] // BLOCK[0]), -(-shape[-1] // BLOCK[1]))
    scale = np.random.default_rng(1).uniform(1e-4, 1e-3, grid).astype(np.float32)
    weight = product(e4m3(codes), spread(scale.astype(float), BLOCK, shape))
    return {name: tensor(codes, E4M3), f"{name}_scale_inv": tensor(scale)}, weight


def mxfp8(name: str, shape: tuple[int, ...]) -> tuple[Stored, np.ndarray]:
    codes, scale = finite_codes(*shape), mx_scale(shape)
    weight = product(e4m3(codes), np.repeat(e8m0(scale), 32, -1))
    return {name: tensor(codes, E4M3), f"{name}_scale_inv": tensor(scale)}, weight


def mxfp4(name: str, shape: tuple[int, ...]) -> tuple[Stored, np.ndarray]:
    codes, scale = random_bytes(*shape[:-1], shape[-1] // 2), mx_scale(shape)
    weight = product(e2m1_pairs(codes), np.repeat(e8m0(scale), 32, -1))
    if name.endswith(".weight"):
        return {f"{name}_packed": tensor(codes), f"{name}_scale": tensor(scale)}, weight
    blocks = codes.reshape(*scale.shape, 16)
    return {f"{name}_blocks": tensor(blocks), f"{name}_scales": tensor(scale)}, weight


def int4(name: str, shape: tuple[int, ...]) -> tuple[Stored, np.ndarray]:
    published = integers(name.removesuffix(".weight"), shape, 16, zero="packed")
    [weight] = published.weights.values()
    return published.stored, weight


def mx_scale(shape: tuple[int, ...]) -> np.ndarray:
    return random_bytes(*shape[:-1], shape[-1] // 32, low=110, high=120)


MODELS: dict[str, dict[str, Any]] = {
    "minimax_m3": {"intermediate_size": 64},  # one tensor an expert, when saved
    "qwen3_moe": {"moe_intermediate_size": 64},  # stacked, as its modules have them
}
CONFIGS: dict[str, tuple[Encode, dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": list(BLOCK)}),
    "mxfp8": (mxfp8, {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "mxfp4": (mxfp4, compressed_tensors_group("mxfp4-pack-quantized", {"num_bits": 4})),
    "int4": (int4, integers("a", (16, 32), 16, zero="packed").quantization or {}),
}


def floats(name: str, folder: Path) -> tuple[Stored, dict[str, Any]]:
    model = build(name, **MODELS[name])
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    if name == "qwen3_moe":
        return dict(model.state_dict()), config
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), config


def linears(tensors: Stored) -> Iterator[str]:
    for name, weight in tensors.items():
        linear = ".experts." in name or name.endswith("_proj.weight")
        if linear and weight.dim() > 1 and weight.shape[-1] % 32 == 0:
            yield name


def outputs(folder: Path) -> Stored:
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


@pytest.mark.parametrize("fmt", CONFIGS)
@pytest.mark.parametrize("model", MODELS)
def test_as_from_its_floats(model: str, fmt: str, tmp_path: Path) -> None:
    encode, quantization = CONFIGS[fmt]
    twin, config = floats(model, tmp_path / "model")
    source = dict(twin)
    for name in linears(twin):
        stored, weight = encode(name, tuple(source.pop(name).shape))
        source |= stored
        # Experts are quantized from exactly what the source means; all else is kept in bfloat16.
        exact = torch.from_numpy(weight)
        twin[name] = exact if ".experts." in name else exact.bfloat16()
    save(tmp_path / "source", source, config | {"quantization_config": quantization})
    save(tmp_path / "twin", twin, config)
    results = []
    for which in ("source", "twin"):
        convert(tmp_path / which, tmp_path / f"{which}-nvfp4")
        results.append(outputs(tmp_path / f"{which}-nvfp4"))
    ours, theirs = results
    assert sum(name.endswith("weight_scale_2") for name in ours) >= 3 * 4
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    for name, expected in theirs.items():
        assert torch.equal(
            ours[name].view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8)
        )
    configs = [(tmp_path / f"{w}-nvfp4" / "config.json").read_text() for w in ("source", "twin")]
    assert json.loads(configs[0]) == json.loads(configs[1])
