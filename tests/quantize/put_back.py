"""Transformers' own experts, and a quantized checkpoint's weights put back into them.

What is written is read by tests/quantize/reference.py, from its bits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantize.experts.gates import Gate
from tests.quantize import reference
from tests.quantize.families import UNSUPPORTED, classes

Weights = tuple[tuple[torch.Tensor, ...], torch.Tensor]
"""One expert's (gate, up) or (up,), each ``[intermediate, hidden]``, and down."""

TOWER = re.compile(r"(?:^|\.)vision_(?:encoder|tower)\.")
"""Dots3 Note's, with experts of the text model's class."""


class Experts:
    """Transformers' module with one layer's experts: what its parameters mean, by its own word."""

    def __init__(self, path: str, module: Any) -> None:
        self.path = path
        self.module = module
        self.joined = getattr(module, "has_gate", True)
        self.transposed = getattr(module, "is_transposed", "Llama4" in type(module).__name__)
        self.concatenated = getattr(module, "is_concatenated", True)

    def stacked(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """The parameters of the first GEMM and of the second."""
        m = self.module
        if hasattr(m, "input_linear"):
            return m.input_linear.weight, m.output_linear.weight
        return (m.gate_up_proj if self.joined else m.up_proj), m.down_proj

    def views(self, expert: int) -> Weights:
        """Views of one expert's weights in the module."""
        if hasattr(self.module, "mlp"):  # DBRX
            w1, v1, w2 = (
                p.data.unflatten(0, (self.module.num_experts, -1))[expert]
                for p in (self.module.mlp.w1, self.module.mlp.v1, self.module.mlp.w2)
            )
            return (w1, v1), w2.T
        first, down = (p.data[expert] for p in self.stacked())
        if self.transposed:
            first, down = first.T, down.T
        if not self.joined:
            return (first,), down
        if self.concatenated:
            half = first.shape[0] // 2
            return (first[:half], first[half:]), down
        return (first[0::2], first[1::2]), down

    def biases(self, expert: int) -> tuple[torch.Tensor | None, ...]:
        """One expert's, in the order of :meth:`views`; None where there is none."""
        both = getattr(self.module, "gate_up_proj_bias", None)
        if both is None:
            return (None,) * (3 if self.joined else 2)
        both, down = both.data[expert], self.module.down_proj_bias.data[expert]
        gate, up = both.chunk(2) if self.concatenated else (both[0::2], both[1::2])
        return gate, up, down

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the module's own forward gives; ``x`` ``[tokens, hidden]``."""
        module = self.module
        if self.transposed and not hasattr(module, "is_transposed"):
            # Llama 4: all tokens to all experts, those not routed as zeros.
            dense = torch.zeros(len(x), module.num_experts, dtype=x.dtype).scatter_(1, ids, weights)
            everything = module(x.repeat(module.num_experts, 1)).unflatten(0, (-1, len(x)))
            return torch.einsum("eth,te->th", everything, dense)
        if hasattr(module, "input_linear"):
            # JetMoE: with our routing for its router's.
            order = ids.flatten().argsort(stable=True)
            sizes = ids.flatten().bincount(minlength=module.input_linear.num_experts).tolist()
            routed = (order, order // 2, weights.flatten()[order], sizes, None)
            module.router.forward = lambda _: routed
            return module(x[None])[0] - module.bias
        return module(x, ids, weights).reshape(x.shape)


def experts_of(model: torch.nn.Module) -> list[Experts]:
    """Its layers' routed experts, in the order of their names; tied ones once."""
    found: dict[int, Experts] = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        if name in classes() and name not in UNSUPPORTED and not TOWER.search(path):
            if name == "JetMoeParallelExperts":
                path, _, kind = path.rpartition(".")
                if path.endswith("experts") or kind != "input_linear":
                    continue  # attention
                module = model.get_submodule(path)
            found.setdefault(next(module.parameters()).data_ptr(), Experts(path, module))
    return sorted(found.values(), key=lambda e: natural(e.path))


def natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def written(folder: Path) -> dict[str, torch.Tensor]:
    """A quantized checkpoint's expert weights, float64, and biases: from bits, by the format."""
    raw = reference.read_folder(folder)
    out = {}
    for name, tensor in raw.items():
        if name.endswith(".weight") and f"{name}_scale" in raw:
            scale = float(raw[f"{name}_scale_2"].array().item())
            packed, bits = tensor.array(), raw[f"{name}_scale"].array()
            out[name] = torch.from_numpy(reference.dequantize(packed, bits, scale))
        elif re.search(r"\.experts\.\d+\.\w+\.bias$", name):
            out[name] = torch.from_numpy(np.array(tensor.array(), np.float64))
    return out


def formula(gate: Gate, *parts: torch.Tensor) -> torch.Tensor:
    """The identified form, written out anew."""
    first, up = parts[0], parts[-1]
    if gate.form == "situ":
        caps = gate.alpha * torch.tanh(first / gate.alpha), gate.limit * torch.tanh(up / gate.limit)
        return caps[0] * torch.sigmoid(first) * caps[1]
    limit = torch.inf if gate.limit is None else gate.limit
    if gate.form == "relu2":
        return up.clamp(min=0) ** 2
    if gate.form == "gelu_tanh":
        return torch.nn.functional.gelu(first, approximate="tanh") * up
    if gate.form == "swiglu_step":
        return (first * torch.sigmoid(first)).clamp(max=limit) * up.clamp(-limit, limit)
    assert gate.form in ("silu", "swiglu_oai")
    low = first.clamp(max=limit)
    return (up.clamp(-limit, limit) + gate.beta) * low * torch.sigmoid(gate.alpha * low)
