"""How a checkpoint's routed experts are stored, layer by layer, and who takes everything else.

A new way to store experts is one class here, with the attributes of :class:`Format`, and one line
in ``_FORMATS``. Everything but routed experts is left to ``stock``, vLLM's own config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from quantize.layouts import LAYOUTS, detect
from quantize.layouts.modelopt import MIXED, WEIGHT_ONLY, algorithm
from quantize.layouts.modelopt import settings as fields_of
from vllm_nvfp4_moe import settings

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from quantize.layouts.layout import Layout


logger = init_logger("vllm.nvfp4_moe.formats")


class Format(ABC):
    """How experts are stored.

    Attributes:
        layout: names of the NVFP4 tensors, and whether their scales multiply or divide.
        stock: vLLM's own config, for everything but routed experts.
        on_the_fly: the experts are plain floats in the files, and are quantized as they load.
    """

    layout: Layout
    stock: QuantizationConfig
    on_the_fly = False

    @abstractmethod
    def weight_only(self, layer: RoutedExperts, prefix: str) -> bool | None:
        """Whether the experts of ``layer`` come without input scales; None if they are not stored
        as NVFP4, so that ``stock`` takes them.

        Args:
            prefix: the layer's module path.
        """


class _ModelOpt(Format):
    """ModelOpt's layout with one algorithm for all modules that are not excluded."""

    layout = LAYOUTS["modelopt"]

    def __init__(self, config: dict[str, Any]) -> None:
        from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

        self._config = ModelOptNvFp4Config.from_config(config)
        self.stock = self._config

    def weight_only(self, layer: RoutedExperts, prefix: str) -> bool | None:
        if self._config.is_layer_excluded(prefix):
            return None
        return WEIGHT_ONLY.get(str(self._algorithm(prefix)))

    def _algorithm(self, prefix: str) -> str | None:
        return str(self._config.quant_method)


class _ModelOptMixed(_ModelOpt):
    """ModelOpt's layout with an algorithm for each module. NVIDIA publishes MiniMax-M3 so: in
    MXFP8, with NVFP4 experts."""

    def __init__(self, config: dict[str, Any]) -> None:
        from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig

        self._config = ModelOptMixedPrecisionConfig.from_config(config)
        self.stock = self._config

    def _algorithm(self, prefix: str) -> str | None:
        return self._config._resolve_quant_algo(prefix)


class _CompressedTensors(Format):
    """compressed-tensors' layout: groups of modules, each with a scheme."""

    layout = LAYOUTS["compressed-tensors"]

    def __init__(self, config: dict[str, Any]) -> None:
        from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors

        self._config = compressed_tensors.CompressedTensorsConfig.from_config(config)
        self.stock = self._config
        groups = config["config_groups"].values()
        self._weight_only = all(group.get("input_activations") is None for group in groups)

    def weight_only(self, layer: RoutedExperts, prefix: str) -> bool | None:
        from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
            should_ignore_layer,
        )

        ignored = should_ignore_layer(
            f"{prefix}.0.{layer.ckpt_down_proj_name}",
            self._config.ignore,
            fused_mapping=self._config.packed_modules_mapping,
        )
        return None if ignored else self._weight_only


class OnTheFly(Format):
    """Experts in plain floats, which are quantized by the rule ``max`` while they load. All else
    stays as it is.

    What lies in memory afterwards is, bit for bit, what ``nvfp4-moe quantize`` would have written
    and this plugin would have loaded. So activations stay floats, unless ``NVFP4_MOE_ACTIVATIONS``
    says otherwise.
    """

    layout = LAYOUTS["modelopt"]
    on_the_fly = True

    def __init__(self) -> None:
        self.stock = _Unquantized()

    def weight_only(self, layer: RoutedExperts, prefix: str) -> bool | None:
        if not settings.on_the_fly_activations():
            return True
        logger.warning_once(
            "NVFP4_MOE_ACTIVATIONS=nvfp4: the experts' input scales are 1.0, since nobody has seen "
            "their inputs. Kernels with 4-bit activations round inputs below about 0.006 to zero "
            "then, and small ones badly; nvfp4-moe quantize --input-scales finds the right ones."
        )
        return False


class _Unquantized(QuantizationConfig):
    """A config under which vLLM does what it does without any quantization."""

    def get_name(self) -> Any:
        return "unquantized"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.half, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _Unquantized:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        # For all other kinds of layers, None means unquantized.
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def needs_layers(config: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` leaves its map of layers to ``hf_quant_config.json``."""
    fields = fields_of(config)
    return algorithm(fields) == MIXED and not fields.get("quantized_layers")


def from_checkpoint(config: dict[str, Any]) -> Format | None:
    """The format of a checkpoint with this ``quantization_config``; None if nothing in it is NVFP4
    in a known layout."""
    layout = detect(config)
    if layout is None or layout.name not in _FORMATS:
        return None
    return _FORMATS[layout.name](config)


def _modelopt(config: dict[str, Any]) -> Format:
    mixed = algorithm(fields_of(config)) == MIXED
    return _ModelOptMixed(config) if mixed else _ModelOpt(config)


_FORMATS: dict[str, Callable[[dict[str, Any]], Format]] = {
    "modelopt": _modelopt,
    "compressed-tensors": _CompressedTensors,
}
"""By the layout's name: how the plugin serves it."""
