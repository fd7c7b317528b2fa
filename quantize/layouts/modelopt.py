"""NVIDIA ModelOpt's layout: ``weight``, ``weight_scale``, ``weight_scale_2``, ``input_scale``.

Global scales are stored as factors: they multiply. Sources: ModelOpt's
``export/unified_export_hf.py`` and vLLM 0.32's ``quantization/modelopt.py``, which reads either
``quantization_config`` of ``config.json`` or the older ``hf_quant_config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantize.checkpoint.kv_cache import FP8, NVFP4
from quantize.layouts.beside import NOTHING, Beside
from quantize.nvfp4.format import BLOCK, NvFp4

MIXED = "MIXED_PRECISION"
"""The ``quant_algo`` of a checkpoint whose ``quantized_layers`` name one for each module."""

WEIGHT_ONLY = {"NVFP4": False, "W4A16_NVFP4": True}
"""Each ``quant_algo`` that stores NVFP4, and whether it quantizes weights only: then activations
stay floats and there are no input scales."""


def settings(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """ModelOpt's fields. In ``hf_quant_config.json`` they are nested in ``quantization``."""
    nested = quantization_config.get("quantization")
    return nested if isinstance(nested, dict) else quantization_config


def algorithm(entry: dict[str, Any]) -> str:
    """``quant_algo``, in upper case, of ModelOpt's fields for a checkpoint or for one module."""
    return str(entry.get("quant_algo")).upper()


class ModelOpt:
    """See ``quantize.layouts.layout.Layout``.

    Args:
        activations: activations are quantized too, ``NVFP4``; else ``W4A16_NVFP4``.
    """

    name = "modelopt"
    reciprocal = False
    config_files = ("hf_quant_config.json",)
    kv_caches: Mapping[str, dict[str, Any]] = {
        FP8: {"dynamic": False, "num_bits": 8, "type": "float"},
        NVFP4: {"dynamic": False, "num_bits": 4, "type": "float"},
    }

    def __init__(self, activations: bool = True) -> None:
        self._activations = activations
        self._algorithm = "NVFP4" if activations else "W4A16_NVFP4"
        inputs = ("input_scale",) if activations else ()
        self.suffixes = ("weight", "weight_scale", "weight_scale_2", *inputs)

    @property
    def weights_only(self) -> ModelOpt:
        return MODELOPT_WEIGHTS

    def store(self, weight: NvFp4) -> dict[str, torch.Tensor]:
        return {
            "weight": weight.codes,
            "weight_scale": weight.block_scale,
            "weight_scale_2": weight.global_scale.reshape(()),
        }

    def store_input_scale(self, input_scale: float) -> dict[str, torch.Tensor]:
        if not self._activations:
            return {}
        return {"input_scale": torch.tensor(input_scale, dtype=torch.float32)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> tuple[NvFp4, torch.Tensor | None]:
        codes, block_scale, global_scale = (tensors[s] for s in self.suffixes[:3])
        input_scale = tensors.get("input_scale")
        weight = NvFp4(codes, block_scale, global_scale.reshape(()))
        return weight, None if input_scale is None else input_scale.reshape(())

    def quantization_config(self, ignore: list[str], beside: Beside = NOTHING) -> dict[str, Any]:
        cache = {"kv_cache_scheme": self.kv_caches[beside.kv_cache]} if beside.kv_cache else {}
        producer = {"producer": {"name": "vllm-nvfp4-moe"}}
        if beside.several:
            return {
                "quant_method": "modelopt",
                "quant_algo": MIXED,
                **cache,
                "quantized_layers": self._layers(beside),
                "ignore": ignore,
                **producer,
            }
        arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
        return {
            "quant_method": "modelopt",
            "quant_algo": self._algorithm,
            "group_size": BLOCK,
            "config_groups": {
                "group_0": {
                    "input_activations": arguments if self._activations else None,
                    "weights": arguments,
                    "targets": ["Linear"],
                }
            },
            **cache,
            "ignore": ignore,
            **producer,
        }

    def extra_files(self, ignore: list[str], beside: Beside = NOTHING) -> dict[str, dict[str, Any]]:
        mixed = {"quantized_layers": self._layers(beside)} if beside.several else {}
        quantization = {
            "quant_algo": MIXED if mixed else self._algorithm,
            "kv_cache_quant_algo": beside.kv_cache.upper() if beside.kv_cache else None,
            **({} if mixed else {"group_size": BLOCK}),
            "exclude_modules": ignore,
            **mixed,
        }
        return {
            "hf_quant_config.json": {
                "producer": {"name": "vllm-nvfp4-moe"},
                "quantization": quantization,
            }
        }

    def _layers(self, beside: Beside) -> dict[str, dict[str, Any]]:
        """``quantized_layers``: each module with an algorithm, as ModelOpt writes it."""
        ours = {"quant_algo": self._algorithm, "group_size": BLOCK}
        weights = {"quant_algo": self.weights_only._algorithm, "group_size": BLOCK}
        others = ((module, base.modelopt) for base, names in beside.eight_bit for module in names)
        nvfp4 = dict.fromkeys(beside.nvfp4, ours) | dict.fromkeys(beside.weight_only, weights)
        return nvfp4 | dict(others)

    def stays_float(self, quantization_config: dict[str, Any], module: str) -> bool:
        fields = settings(quantization_config)
        layers = fields.get("quantized_layers")
        entry = layers.get(module) if isinstance(layers, dict) else None
        found = algorithm(entry if isinstance(entry, dict) else fields)
        return WEIGHT_ONLY.get(found, not self._activations)

    def describes(self, quantization_config: dict[str, Any]) -> bool:
        method = str(quantization_config.get("quant_method", "modelopt")).lower()
        if not method.startswith("modelopt"):
            return False
        fields = settings(quantization_config)
        layers = fields.get("quantized_layers")
        if algorithm(fields) != MIXED or not isinstance(layers, dict):
            # A mixed checkpoint without its map of layers may hold NVFP4: the map may be in
            # hf_quant_config.json.
            return algorithm(fields) in (self._algorithm, *[MIXED] * self._activations)
        every = {algorithm(entry) for entry in layers.values() if isinstance(entry, dict)}
        weights_only = {WEIGHT_ONLY[name] for name in every & WEIGHT_ONLY.keys()}
        return bool(weights_only) and all(weights_only) is not self._activations


MODELOPT = ModelOpt()
MODELOPT_WEIGHTS = ModelOpt(activations=False)
