"""compressed-tensors' ``nvfp4-pack-quantized`` layout, as llm-compressor writes it.

Global scales are stored as their reciprocals: ``weight_global_scale`` divides. The config comes
from the library's own models, so that it stays what the library reads.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    preset_name_to_scheme,
)

from quantize.nvfp4 import NvFp4


class CompressedTensors:
    """See ``quantize.layouts.Layout``."""

    name = "compressed-tensors"
    suffixes = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    reciprocal = True

    def store(self, weight: NvFp4, input_scale: float) -> tuple[torch.Tensor, ...]:
        scale = torch.tensor([1 / input_scale], dtype=torch.float32)
        return weight.codes, weight.block_scale, weight.global_scale.reshape(1).reciprocal(), scale

    def restore(self, tensors: tuple[torch.Tensor, ...]) -> tuple[NvFp4, torch.Tensor]:
        codes, block_scale, global_scale, input_scale = tensors
        weight = NvFp4(codes, block_scale, global_scale.reshape(()).reciprocal())
        return weight, input_scale.reshape(()).reciprocal()

    def quantization_config(self, ignore: list[str]) -> dict[str, Any]:
        scheme = preset_name_to_scheme("NVFP4", ["Linear"])
        scheme.format = CompressionFormat.nvfp4_pack_quantized.value
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            format=CompressionFormat.nvfp4_pack_quantized.value,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=ignore,
        )
        return config.model_dump(mode="json")

    def extra_files(self, ignore: list[str]) -> dict[str, dict[str, Any]]:
        return {}

    def describes(self, quantization_config: dict[str, Any]) -> bool:
        if quantization_config.get("quant_method") != "compressed-tensors":
            return False
        groups = quantization_config.get("config_groups")
        formats = [quantization_config.get("format")]
        if isinstance(groups, dict):
            formats += [g.get("format") for g in groups.values() if isinstance(g, dict)]
        return CompressionFormat.nvfp4_pack_quantized.value in formats
