"""What evaluate must find, from whole models in memory: Transformers' own, in float64, and the same
with weights and activations that are decoded and rounded here, in plain arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.plugin.reference import dequantize
from tests.quantize import families

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.tensor(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8 - (e == 15))],
    dtype=torch.float64,
)
"""Magnitudes, by code."""

Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Round = Callable[[torch.Tensor], torch.Tensor]


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def nearest(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``x`` to the nearest of ``values`` in magnitude, at most the largest; ties to even codes."""
    away = (x.abs().unsqueeze(-1) - values).abs()
    low = away.argmin(-1)
    high = len(values) - 1 - away.flip(-1).argmin(-1)
    return values[torch.where(low % 2 == 0, low, high)].copysign(x)


def round_nvfp4(x: torch.Tensor, input_scale: float) -> torch.Tensor:
    blocks = x.unflatten(-1, (-1, 16))
    step = nearest(blocks.abs().amax(-1, keepdim=True) / 6 / input_scale, E4M3) * input_scale
    return torch.where(step > 0, nearest(blocks / step, E2M1) * step, 0.0).flatten(-2)


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return nearest(x / scale, E4M3) * scale


class Stored:
    """The tensors of a quantized folder, by their names."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "model.safetensors")

    def experts(self, layer: int, names: tuple[str, ...]) -> list[list[torch.Tensor]]:
        """For each expert of a layer the weights of these names, float64."""
        found: dict[int, list[torch.Tensor]] = {}
        for stem, expert in self._stems(layer):
            found[expert] = [self.weight(f"{stem}.{name}") for name in names]
        return [found[expert] for expert in sorted(found)]

    def input_scales(self, layer: int, *names: str) -> float:
        """The largest of a layer's input scales of these names."""
        found = []
        for stem, _ in self._stems(layer):
            for name in names:
                scale = self.tensors.get(f"{stem}.{name}.input_scale")
                if scale is None:
                    scale = 1 / self.tensors[f"{stem}.{name}.input_global_scale"]
                found.append(float(scale))
        return max(found)

    def weight(self, module: str) -> torch.Tensor:
        """An NVFP4 weight."""
        part = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{module}.")
        }
        if "weight_packed" in part:
            scale = 1 / part["weight_global_scale"].double()
            return dequantize(part["weight_packed"], part["weight_scale"], scale)
        return dequantize(part["weight"], part["weight_scale"], part["weight_scale_2"])

    def eight_bits(self) -> dict[str, torch.Tensor]:
        """FP8 weights with a scale for 128 x 128, and MXFP8 ones, by name."""
        found = {}
        for name, codes in self.tensors.items():
            scale = self.tensors.get(f"{name}_scale_inv")
            scale = self.tensors.get(f"{name}_scale") if scale is None else scale
            if codes.dtype == torch.float8_e4m3fn and scale is not None:
                if scale.dtype == torch.uint8:
                    whole = (2.0 ** (scale.double() - 127)).repeat_interleave(32, 1)
                else:
                    grid = scale.double().reshape(codes.shape[0] // 128, codes.shape[1] // 128)
                    whole = grid.repeat_interleave(128, 0).repeat_interleave(128, 1)
                found[name] = codes.double() * whole
        return found

    def _stems(self, layer: int) -> list[tuple[str, int]]:
        pattern = re.compile(rf"(.*\.layers\.{layer}\..*experts\.(\d+))\.\w+\.weight(_packed)?")
        matches = filter(None, map(pattern.fullmatch, self.tensors))
        return sorted({(match[1], int(match[2])) for match in matches if "shared" not in match[1]})


def model_of(folder: Path) -> Any:
    """Transformers' model of a tiny family's checkpoint."""
    cls = type(families.of_config(AutoConfig.from_pretrained(folder)))
    return cls.from_pretrained(  # type: ignore[attr-defined]
        folder, dtype=torch.float64, experts_implementation="eager", attn_implementation="sdpa"
    ).eval()


def replaced(
    folder: Path,
    quantized: Path,
    gate: Gate,
    activations: str = "bf16",
) -> Any:
    """The model of ``folder`` with what ``quantized`` holds."""
    model, stored = model_of(folder), Stored(quantized)
    mixtral = any(".w1.weight" in name for name in stored.tensors)
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, weight in stored.eight_bits().items():
        model.get_parameter(name).data.copy_(weight)
    for path, module in list(model.named_modules()):
        number = re.search(r"\.layers\.(\d+)\..*experts$", path)
        if number is None or not hasattr(module, "down_proj") or "shared" in path:
            continue
        layer = int(number[1])
        experts = stored.experts(layer, names)
        assert len(experts) == len(module.down_proj)
        rounds: tuple[Round, Round] = (lambda x: x, lambda x: x)
        if activations == "nvfp4":
            first = stored.input_scales(layer, *names[:-1])
            second = stored.input_scales(layer, names[-1])
            rounds = (
                lambda x, scale=first: round_nvfp4(x, scale),
                lambda x, scale=second: round_nvfp4(x, scale),
            )
        elif activations == "fp8":
            rounds = round_fp8, round_fp8
        module.forward = _forward(experts, gate, rounds)
    return model


def _forward(experts: list[list[torch.Tensor]], gate: Gate, rounds: tuple[Round, Round]) -> Any:
    def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        shape, x = x.shape, x.flatten(0, -2)
        out = torch.zeros_like(x)
        ids, weights = ids.reshape(len(x), -1), weights.reshape(len(x), -1)
        for expert, (*first, down) in enumerate(experts):
            tokens, slots = torch.where(ids == expert)
            rows = rounds[0](x[tokens])
            middle = gate(*(rows @ matrix.T for matrix in first))
            own = rounds[1](middle) @ down.T
            out.index_add_(0, tokens, own * weights[tokens, slots].unsqueeze(1).double())
        return out.view(shape)

    return forward


class Truth(NamedTuple):
    """Figures of two models on the same rows."""

    before: float
    after: float
    kl: float
    kl_error: float
    top1: float
    depth: list[tuple[float, float]]


def compare(source: Any, target: Any, rows: torch.Tensor) -> Truth:
    """See ``quantize.evaluate``; logits of all rows in memory at once."""
    (first, before), (second, after) = (_run(model, rows) for model in (source, target))
    ours, theirs = (logits[:, :-1].double().log_softmax(-1) for logits in (first, second))
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    losses = [-lp.gather(-1, rows[:, 1:, None]).mean().item() for lp in (ours, theirs)]
    depth = []
    for a, b in zip(before, after, strict=True):
        a, b = (part.reshape(rows.numel(), -1) for part in (a, b))
        token = (b - a).norm(dim=1) / a.norm(dim=1)
        depth.append((float((b - a).norm() / a.norm()), float(token.median())))
    return Truth(
        math.exp(losses[0]),
        math.exp(losses[1]),
        kl.mean().item(),
        kl.mean(1).std().item() / math.sqrt(len(rows)),
        float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        depth,
    )


def _run(model: Any, rows: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and what each decoder layer returns."""
    states: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).clone())

    paths = {
        path
        for path, _ in model.named_modules()
        if re.fullmatch(r"(?:model\.)?(?:language_model\.)?layers\.\d+", path)
    }
    hooks = [model.get_submodule(path).register_forward_hook(keep) for path in paths]
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, states
