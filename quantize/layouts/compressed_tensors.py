"""compressed-tensors' ``nvfp4-pack-quantized`` layout, as llm-compressor writes it.

Global scales are stored as their reciprocals: ``weight_global_scale`` divides. The config is made
with the library's own classes, so that the library can always read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantize.nvfp4.format import NvFp4

_FORMAT = "nvfp4-pack-quantized"
"""The library's ``CompressionFormat.nvfp4_pack_quantized``, repeated since its import is slow."""


class CompressedTensors:
    """See ``quantize.layouts.layout.Layout``."""

    name = "compressed-tensors"
    suffixes = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    reciprocal = True
    config_files: tuple[str, ...] = ()

    def store(self, weight: NvFp4) -> dict[str, torch.Tensor]:
        return {
            "weight_packed": weight.codes,
            "weight_scale": weight.block_scale,
            "weight_global_scale": weight.global_scale.reshape(1).reciprocal(),
        }

    def store_input_scale(self, input_scale: float) -> dict[str, torch.Tensor]:
        return {"input_global_scale": torch.tensor([1 / input_scale], dtype=torch.float32)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> tuple[NvFp4, torch.Tensor | None]:
        codes, block_scale, global_scale = (tensors[s] for s in self.suffixes[:3])
        input_scale = tensors.get("input_global_scale")
        weight = NvFp4(codes, block_scale, global_scale.reshape(()).reciprocal())
        return weight, None if input_scale is None else input_scale.reshape(()).reciprocal()

    def quantization_config(self, ignore: list[str]) -> dict[str, Any]:
        from compressed_tensors.quantization import (  # takes seconds to import
            QuantizationConfig,
            QuantizationStatus,
            preset_name_to_scheme,
        )

        scheme = preset_name_to_scheme("NVFP4", ["Linear"])
        scheme.format = _FORMAT
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            format=_FORMAT,
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
        return _FORMAT in formats


COMPRESSED_TENSORS = CompressedTensors()
