"""Things that a contributor might add, each in the form that its registry asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from quantize.checkpoint.sources.stored_weight import StoredWeight, from_pair
from quantize.checkpoint.tensors import TensorInfo
from quantize.experts.gates.silu import Silu
from quantize.nvfp4.format import BLOCK, NvFp4, dequantize, encode, round_to_e4m3
from quantize.nvfp4.input_scales.magnitudes import Magnitudes
from quantize.nvfp4.rounding.method import Method
from quantize.nvfp4.scales.max import max_scale
from quantize.nvfp4.scales.rule import Reach, ScaleRule


def _global_scale(amax: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return amax.float() / (6 * 256)


ROOMY = ScaleRule(max_scale, reach=Reach(), global_scale=_global_scale)
"""A scale rule that chooses the global scale: the largest block scale is 256, not 448."""


def _nearest_of_three(weight: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """Each block's best of the max rule's scale and its two neighbours, tried one by one."""
    start = max_scale(weight, global_scale).view(torch.uint8).int()
    best, least = start.clone(), torch.full(start.shape, torch.inf, dtype=torch.float64)
    for offset in (0, -1, 1):
        bits = (start + offset).clamp(1, 126)
        scale = bits.to(torch.uint8).view(torch.float8_e4m3fn)
        restored = dequantize(encode(weight, scale, global_scale), scale, global_scale)
        lost = (restored.double() - weight.double()).square().unflatten(-1, (-1, BLOCK)).sum(-1)
        better = lost < least * (1 - 1e-6)
        best, least = torch.where(better, bits, best), torch.where(better, lost, least)
    return best.to(torch.uint8).view(torch.float8_e4m3fn)


NEIGHBOURS = ScaleRule(_nearest_of_three, reach=Reach(below=1, above=1))
"""A scale rule that searches: kernels are as fast with it as with ``mse``."""


def one_for_the_largest(magnitudes: Magnitudes) -> float:
    """An input scale rule: the block scale of the largest block is 1, with ever so much room."""
    return magnitudes.largest / 6 or 1.0


class WeightOnly:
    """A layout of three tensors, without an input scale."""

    name = "weight-only"
    suffixes = ("q", "s", "g")
    reciprocal = False
    config_files = ("toy.json",)
    kv_caches: ClassVar[dict[str, dict[str, Any]]] = {}

    @property
    def weights_only(self) -> WeightOnly:
        return self

    def store(self, weight: NvFp4) -> dict[str, torch.Tensor]:
        return {"q": weight.codes, "s": weight.block_scale, "g": weight.global_scale.reshape(())}

    def store_input_scale(self, input_scale: float) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> tuple[NvFp4, torch.Tensor | None]:
        return NvFp4(tensors["q"], tensors["s"], tensors["g"].reshape(())), None

    def quantization_config(self, ignore: list[str], beside: Any = None) -> dict[str, Any]:
        return {"quant_method": "toy", "ignore": ignore}

    def stays_float(self, quantization_config: dict[str, Any], module: str) -> bool:
        return True

    def extra_files(self, ignore: list[str], beside: Any = None) -> dict[str, dict[str, Any]]:
        return {"toy.json": {"ignore": ignore}}

    def describes(self, quantization_config: dict[str, Any]) -> bool:
        return quantization_config.get("quant_method") == "toy"


WEIGHT_ONLY = WeightOnly()


class Int8Rows:
    """A source format: ``weight`` INT8 ``[out, in]``, ``weight_scale`` float32 ``[out, 1]``."""

    name = "int8-rows"
    config_names = frozenset({"toy_int8"})

    def find(self, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> list[StoredWeight]:
        return [
            from_pair(self.name, name, info.shape, (info, stored[f"{name}_scale"]), stored, _decode)
            for name, info in stored.items()
            if info.dtype == "I8" and f"{name}_scale" in stored
        ]

    def complaint(self, info: TensorInfo) -> str | None:
        return "is INT8 without a scale" if info.dtype == "I8" else None


INT8_ROWS = Int8Rows()


def _decode(
    codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    values = codes.float() * scale
    return values if out is None else out.view(values.shape).copy_(values)


def _to_nearest(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    global_scale: torch.Tensor,
    output_hessian: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    amax = weight.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    block_scale = round_to_e4m3(amax / (6 * global_scale))
    return encode(weight, block_scale, global_scale), block_scale


NEAREST = Method(_to_nearest)
"""A rounding that does not look at the inputs."""


class Mish(Silu):
    """A gate: ``up * mish(gate)``."""

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        return F.mish(gate) * up
