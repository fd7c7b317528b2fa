"""compressed-tensors' ``nvfp4-pack-quantized`` layout, as llm-compressor writes it.

Global scales are stored as their reciprocals: ``weight_global_scale`` divides. The config is made
with the library's own classes, so that the library can always read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantize.checkpoint.kv_cache import FP8, FP8_HEAD
from quantize.layouts.beside import NOTHING, Beside
from quantize.layouts.targets import named, targets
from quantize.nvfp4.format import NvFp4

_FORMAT, _MIXED = "nvfp4-pack-quantized", "mixed-precision"
"""The library's ``CompressionFormat``, repeated since its import is slow."""


class CompressedTensors:
    """See ``quantize.layouts.layout.Layout``.

    Args:
        activations: activations are quantized too, the library's preset ``NVFP4``; else
            ``NVFP4A16``.
    """

    name = "compressed-tensors"
    reciprocal = True
    config_files: tuple[str, ...] = ()
    kv_caches: Mapping[str, dict[str, Any]] = {
        FP8: {"num_bits": 8, "type": "float", "strategy": "tensor"},
        FP8_HEAD: {"num_bits": 8, "type": "float", "strategy": "attn_head"},
    }

    def __init__(self, activations: bool = True) -> None:
        self._activations = activations
        inputs = ("input_global_scale",) if activations else ()
        self.suffixes = ("weight_packed", "weight_scale", "weight_global_scale", *inputs)

    @property
    def weights_only(self) -> CompressedTensors:
        return COMPRESSED_TENSORS_WEIGHTS

    def store(self, weight: NvFp4) -> dict[str, torch.Tensor]:
        return {
            "weight_packed": weight.codes,
            "weight_scale": weight.block_scale,
            "weight_global_scale": weight.global_scale.reshape(1).reciprocal(),
        }

    def store_input_scale(self, input_scale: float) -> dict[str, torch.Tensor]:
        if not self._activations:
            return {}
        return {"input_global_scale": torch.tensor([1 / input_scale], dtype=torch.float32)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> tuple[NvFp4, torch.Tensor | None]:
        codes, block_scale, global_scale = (tensors[s] for s in self.suffixes[:3])
        input_scale = tensors.get("input_global_scale")
        weight = NvFp4(codes, block_scale, global_scale.reshape(()).reciprocal())
        return weight, None if input_scale is None else input_scale.reshape(()).reciprocal()

    def quantization_config(self, ignore: list[str], beside: Beside = NOTHING) -> dict[str, Any]:
        from compressed_tensors.quantization import (  # takes seconds to import
            QuantizationArgs,
            QuantizationConfig,
            QuantizationStatus,
            preset_name_to_scheme,
        )

        preset = "NVFP4" if self._activations else "NVFP4A16"
        scheme = preset_name_to_scheme(preset, ["Linear"])
        scheme.format = _FORMAT
        groups = {"group_0": scheme}
        # Readers look for a module's name before its class, so these are not the first group's.
        others = [(base.preset, base.format, modules) for base, modules in beside.eight_bit]
        if beside.weight_only:
            others.append(("NVFP4A16", _FORMAT, beside.weight_only))
        # What is ignored, too: layers that draft may be looked for here without that list.
        apart = (name for *_, modules in others for name in modules)
        everything = {*ignore, *beside.nvfp4, *apart}
        for number, (preset, stored, modules) in enumerate(others, 1):
            names = targets(modules, everything.difference(modules), beside.experts_by_name)
            groups[f"group_{number}"] = preset_name_to_scheme(preset, names)
            groups[f"group_{number}"].format = stored
        cache = self.kv_caches[beside.kv_cache] if beside.kv_cache else None
        config = QuantizationConfig(
            config_groups=groups,
            format=_MIXED if beside.eight_bit else _FORMAT,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=ignore,
            kv_cache_scheme=QuantizationArgs(**cache) if cache else None,
        )
        return config.model_dump(mode="json")

    def stays_float(self, quantization_config: dict[str, Any], module: str) -> bool:
        groups = quantization_config.get("config_groups")
        found = list(groups.values()) if isinstance(groups, dict) else []
        groups_of_it = [group for group in found if named(group, module)]
        return any(group.get("input_activations") is None for group in groups_of_it) or (
            not groups_of_it and not self._activations
        )

    def extra_files(self, ignore: list[str], beside: Beside = NOTHING) -> dict[str, dict[str, Any]]:
        return {}

    def describes(self, quantization_config: dict[str, Any]) -> bool:
        if quantization_config.get("quant_method") != "compressed-tensors":
            return False
        every = quantization_config.get("format")
        groups = quantization_config.get("config_groups")
        found = list(groups.values()) if isinstance(groups, dict) else []
        ours = [g for g in found if isinstance(g, dict) and _FORMAT in (g.get("format"), every)]
        if not ours and every != _FORMAT:
            return False
        weights_only = bool(ours) and all(g.get("input_activations") is None for g in ours)
        return weights_only is not self._activations


COMPRESSED_TENSORS = CompressedTensors()
COMPRESSED_TENSORS_WEIGHTS = CompressedTensors(activations=False)
