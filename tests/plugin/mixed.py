"""Makes ModelOpt's mixed layout, as NVIDIA publishes MiniMax-M3: MXFP8 with NVFP4 experts.

    python -m tests.plugin.mixed SOURCE TARGET

SOURCE is a folder in ModelOpt's layout whose experts are NVFP4 and whose other weights are plain
floats; attention's and dense layers' become MXFP8 in TARGET. The map of layers goes to
``hf_quant_config.json`` alone. Source of the layout: TensorRT-LLM's pull request 15857, which names
the keys, and vLLM 0.32's ``ModelOptMixedPrecisionConfig``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = 32
_LINEAR = re.compile(
    r"(?:^|\.)layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:shared_experts\.)?\w+_proj"
    r"|block_sparse_moe\.shared_experts\.\w+_proj)\.weight$"
)


def encode_mxfp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 ``[out, in]`` and E8M0 exponents, uint8 ``[out, in / 32]``, of a float weight."""
    blocks = weight.double().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1).clamp_min(2.0**-100)
    exponent = (amax / 448).log2().ceil()
    codes = (blocks / exponent.exp2().unsqueeze(-1)).flatten(-2).float().to(torch.float8_e4m3fn)
    return codes, (exponent + 127).to(torch.uint8)


def decode_mxfp8(codes: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`encode_mxfp8`, float64."""
    scale = (exponent.double() - 127).exp2().repeat_interleave(BLOCK, -1)
    return codes.double() * scale


def write(source: Path, target: Path, map_in_config: bool = False) -> Path:
    """Write the mixed checkpoint; ``map_in_config``: as newer ModelOpt versions do."""
    shutil.copytree(source, target)
    layers: dict[str, dict[str, object]] = {}
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file)
        for name in list(tensors):
            module = name.removesuffix(".weight")
            if _LINEAR.search(name) and tensors[name].is_floating_point():
                tensors[name], tensors[f"{name}_scale"] = encode_mxfp8(tensors[name])
                layers[module] = {"quant_algo": "MXFP8", "group_size": BLOCK}
            elif name.endswith(".weight_scale_2"):
                expert = name.removesuffix(".weight_scale_2")
                layers[expert] = {"quant_algo": "NVFP4", "group_size": 16}
        save_file(tensors, file, {"format": "pt"})
    (target / "model.safetensors.index.json").unlink(missing_ok=True)  # it lacks the new scales
    config = json.loads((target / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    mixed: dict[str, object] = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "ignore": [name for name in ignore if name not in layers],
        **({"quantized_layers": layers} if map_in_config else {}),
    }
    (target / "config.json").write_text(json.dumps(config))
    (target / "hf_quant_config.json").write_text(
        json.dumps(
            {
                "producer": {"name": "modelopt", "version": "0.44.0"},
                "quantization": {
                    **mixed,
                    "exclude_modules": config["quantization_config"]["ignore"],
                    "quantized_layers": layers,
                },
            }
        )
    )
    return target


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
