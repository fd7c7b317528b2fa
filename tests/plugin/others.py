"""Small checkpoints as other tools write them: which module is quantized how, one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Options
from quantize.run.plan import plan
from tests.quantize import families

HIDDEN, INNER, EXPERTS = 64, 48, 4
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")

WEIGHTS: dict[str, Any] = {
    "num_bits": 4, "type": "float", "symmetric": True, "group_size": 16,
    "strategy": "tensor_group", "dynamic": False,
}  # fmt: skip
INT8: dict[str, Any] = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
}  # fmt: skip
INT8_INPUTS = INT8 | {"strategy": "token", "dynamic": True}


def group(targets: list[str], weights: Any, inputs: Any, form: str) -> dict[str, Any]:
    """One of compressed-tensors' ``config_groups``."""
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": form,
    }


def nvfp4(*targets: str, inputs: Any = None) -> dict[str, Any]:
    """The group of modules in NVFP4, with activations as ``inputs`` says."""
    return group(list(targets), WEIGHTS, inputs, "nvfp4-pack-quantized")


def int8(*targets: str) -> dict[str, Any]:
    """The group of modules in INT8, with activations that are quantized as they come."""
    return group(list(targets), INT8, INT8_INPUTS, "int-quantized")


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[out, in]``, and a scale for each row."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scale).round().to(torch.int8), scale


def plain(folder: Path, **more: Any) -> Path:
    """A Qwen3-MoE of two layers in bfloat16, one tensor an expert."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=64, moe_intermediate_size=INNER,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=64, **more,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def quantized(source: Path, folder: Path, **options: Any) -> Path:
    """What this package makes of ``source``."""
    with Checkpoint(source) as checkpoint:
        execute(checkpoint, plan(checkpoint, Options(**options)), folder)
    return folder


def written(config: Any, folder: Path, layouts: Sequence[str]) -> None:
    """A tiny model with random weights as Transformers saves it (``bf16``), and quantized in each
    layout (under its name)."""
    torch.manual_seed(0)
    model: Any = families.of_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.bfloat16().save_pretrained(folder / "bf16")
    for layout in layouts:
        quantized(folder / "bf16", folder / layout, layout=layout)


def rewrite(folder: Path, quantization: dict[str, Any], **tensors: torch.Tensor | None) -> Path:
    """Change a folder's ``quantization_config`` and tensors (None: take it away), and drop what
    this package alone would have written: others' checkpoints have no contract."""
    file = folder / "model.safetensors"
    changed = {k: v for k, v in (load_file(file) | tensors).items() if v is not None}
    save_file({k: v.contiguous() for k, v in changed.items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    config.pop("nvfp4_moe", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def grouped(
    *groups: dict[str, Any], ignore: tuple[str, ...] = ("lm_head", "re:.*mlp.gate$")
) -> Any:
    """compressed-tensors' ``quantization_config`` of several groups."""
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {f"group_{n}": each for n, each in enumerate(groups)},
    }
