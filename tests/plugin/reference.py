"""Plain float references, sharing no code with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def dequantize(
    codes: torch.Tensor, block_scale: torch.Tensor, multiplier: torch.Tensor
) -> torch.Tensor:
    """float64 weight of one tensor; ``multiplier`` is the global scale as it multiplies."""
    low, high = codes & 15, codes >> 4
    both = torch.stack((low, high), -1).flatten(-2).long()
    values = E2M1[both & 7] * (1 - 2 * (both >> 3)).double()
    scale = block_scale.double().repeat_interleave(16, -1) * multiplier.double()
    return values * scale


def experts_of(
    folder: Path,
    prefix: str,
    layout: str,
    experts: int,
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> list[list[torch.Tensor]]:
    """[gate, up, down] in float64 for each expert of a layer in a quantized folder; without a gate,
    whose ``projections`` are two, [up, down]."""
    tensors = load_file(folder / "model.safetensors")
    found = []
    for expert in range(experts):
        weights = []
        for name in projections:
            base = f"{prefix}.{expert}.{name}."
            if layout == "modelopt":
                codes, glob = tensors[base + "weight"], tensors[base + "weight_scale_2"]
            else:
                codes = tensors[base + "weight_packed"]
                glob = 1 / tensors[base + "weight_global_scale"].double()
            weights.append(dequantize(codes, tensors[base + "weight_scale"], glob.reshape(())))
        found.append(weights)
    return found


def m3_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """MiniMax-M3's clamped SwiGLU-OAI (models/README.md)."""
    gate = gate.clamp(max=7.0)
    return (up.clamp(-7.0, 7.0) + 1) * gate * torch.sigmoid(1.702 * gate)


def relu2(up: torch.Tensor) -> torch.Tensor:
    """Nemotron-H's ReLU², which has no gate."""
    return up.clamp(min=0) ** 2


def routed(
    x: torch.Tensor,
    experts: list[list[torch.Tensor]],
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_of: object = m3_gate,
) -> torch.Tensor:
    """float64 output of routed experts, one token and expert at a time. ``gate_of`` gets what all
    matrices of an expert but the last give."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            *first, down = experts[expert]
            row = x[token].double()
            middle = gate_of(*(matrix @ row for matrix in first))  # type: ignore[operator]
            out[token] += weight.double() * (down @ middle)
    return out
