"""A tiny GPT-OSS whose experts' biases matter, and what its experts give: two references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.plugin.reference import experts_of, m3_gate
from tests.quantize import checkpoints

EXPERTS, HIDDEN, INNER = 4, 64, 64
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def save(folder: Path, layers: int = 1, seed: int = 0, spread: float = 1.0, **sizes: int) -> Path:
    """Random, in bfloat16, as Transformers saves it: experts stacked, gate and up alternating.

    Args:
        spread: standard deviation of the experts' biases. Without them, gate and up have one of
            about 1 for tokens of that size.
    """
    torch.manual_seed(seed)
    config = checkpoints.gpt_oss(
        intermediate_size=INNER, num_hidden_layers=layers, layer_types=["full_attention"] * layers,
        **{"hidden_size": HIDDEN} | sizes,
    )  # fmt: skip
    model: Any = transformers.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, spread if "experts" in name and "bias" in name else 0.15)
        if "norm" in name:
            parameter.data += 1
    model.bfloat16().save_pretrained(folder)
    return folder


def biases_of(folder: Path, prefix: str) -> list[list[torch.Tensor]]:
    """[gate, up, down] biases in float64 for each expert of a layer in a quantized folder."""
    tensors = load_file(folder / "model.safetensors")
    return [
        [tensors[f"{prefix}.{expert}.{name}.bias"].double() for name in PROJECTIONS]
        for expert in range(EXPERTS)
    ]


def plainly(
    folder: Path,
    prefix: str,
    layout: str,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
) -> torch.Tensor:
    """float64 output of a layer's routed experts, one token and expert at a time."""
    matrices, biases = experts_of(folder, prefix, layout, EXPERTS), biases_of(folder, prefix)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            (gate, up, down), (gate_b, up_b, down_b) = matrices[expert], biases[expert]
            middle = m3_gate(gate @ row + gate_b, up @ row + up_b)
            out[token] += weight * (down @ middle + down_b)
    return out


def transformers_module(folder: Path, prefix: str, layout: str) -> torch.nn.Module:
    """Transformers' own module for the experts, in float64, with the dequantized weights."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    module = GptOssExperts(_config(folder)).double()
    fill(module, folder, prefix, layout)
    return module


def _config(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config._experts_implementation = "eager"
    return config


def log_probabilities(folder: Path, layout: str, rows: list[list[int]]) -> torch.Tensor:
    """Of each row's tokens after its first, float32 ``[rows, tokens - 1]``, by Transformers' model
    with the dequantized weights, in float32."""
    model: Any = transformers.GptOssForCausalLM._from_config(_config(folder)).float().eval()
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({n: t for n, t in stored.items() if ".experts." not in n}, strict=False)
    for number, layer in enumerate(model.model.layers):
        fill(layer.mlp.experts, folder, f"model.layers.{number}.mlp.experts", layout)
    tokens = torch.tensor(rows)
    with torch.no_grad():
        found = model(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    return found.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def fill(module: Any, folder: Path, prefix: str, layout: str) -> None:
    """Give Transformers' module what the folder's tensors mean."""
    pairs = zip(experts_of(folder, prefix, layout, EXPERTS), biases_of(folder, prefix), strict=True)
    for expert, ((gate, up, down), (gate_b, up_b, down_b)) in enumerate(pairs):
        for stack, bias, columns, matrix, row in (
            (module.gate_up_proj, module.gate_up_proj_bias, slice(0, None, 2), gate, gate_b),
            (module.gate_up_proj, module.gate_up_proj_bias, slice(1, None, 2), up, up_b),
            (module.down_proj, module.down_proj_bias, slice(None), down, down_b),
        ):
            stack.data[expert, :, columns] = matrix.T
            bias.data[expert, columns] = row


def damaged(source: Path, target: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy with some tensors exchanged, or left out (None)."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json" and file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    changed = {**load_file(source / "model.safetensors"), **tensors}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target
