"""Which checkpoints and which layers this package takes.

A checkpoint is claimed only when the user says ``--quantization nvfp4_moe``. Its routed experts
get this package's method. Everything else is left to the stock config of its layout, so that dense
layers, KV caches and mixed layouts behave as in vLLM without the plugin. The experts of a
checkpoint that is not quantized are quantized while they load.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_nvfp4_moe.settings import NAME

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from quantize.experts.gates import Gates
    from vllm_nvfp4_moe.context import ModelContext
    from vllm_nvfp4_moe.loading.formats import Format

logger = logging.getLogger("vllm.nvfp4_moe.config")

_NOT_OURS = (
    "--quantization nvfp4_moe needs a checkpoint whose routed experts are NVFP4, in ModelOpt's or "
    "compressed-tensors' layout, or not quantized at all, and {found}. Make one with: "
    "nvfp4-moe quantize SOURCE TARGET"
)


class NvFp4MoEConfig(QuantizationConfig):
    """The quantization config that ``--quantization nvfp4_moe`` selects.

    Args:
        quantization: the checkpoint's ``quantization_config``. It is None if the checkpoint is not
            quantized: vLLM then builds the config without arguments, and the experts are quantized
            while they load.

    Attributes:
        gates: which gates the experts apply. None until :meth:`maybe_update_config` is called.
        self_check: of the kernels of this model's layers.

    Raises:
        ValueError: if nothing in the checkpoint is NVFP4.
    """

    def __init__(self, quantization: dict[str, Any] | None = None) -> None:
        # Imported here and below, not above: vLLM imports this module in each of its processes,
        # whatever it serves.
        from vllm_nvfp4_moe.loading import formats
        from vllm_nvfp4_moe.self_check import SelfCheck

        super().__init__()
        self.gates: Gates | None = None
        self.self_check = SelfCheck()
        self._format: Format | None = None
        if quantization is None:
            self._format = formats.OnTheFly()
        elif not formats.needs_layers(quantization):
            self._format = self._read(quantization)

    @property
    def format(self) -> Format:
        """How the checkpoint's experts are stored."""
        assert self._format is not None, "vLLM calls maybe_update_config before it builds layers"
        return self._format

    @cached_property
    def context(self) -> ModelContext:
        """What the layers of the model share, once :meth:`maybe_update_config` was called."""
        from vllm_nvfp4_moe.context import ModelContext
        from vllm_nvfp4_moe.summary import Summary

        assert self.gates is not None, "vLLM calls maybe_update_config before it builds layers"
        summary = Summary(self.format, self.gates, self.self_check)
        return ModelContext(self.format, self.gates, self.self_check, summary)

    def get_name(self) -> str:
        return NAME

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # as vLLM's modelopt_fp4

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        from vllm.platforms import current_platform

        dtypes = [torch.bfloat16, torch.half]
        return [*dtypes, torch.float32] if current_platform.is_cpu() else dtypes

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # vLLM then builds the config of an unquantized checkpoint without arguments

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> Any:
        if user_quant != NAME:
            return None
        from quantize.layouts import detect

        if not isinstance(hf_quant_cfg, dict) or detect(hf_quant_cfg) is None:
            method = hf_quant_cfg.get("quant_method") if isinstance(hf_quant_cfg, dict) else None
            raise ValueError(_NOT_OURS.format(found=f"this one's quant_method is {method!r}"))
        return NAME

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NvFp4MoEConfig:
        return cls(config)

    @staticmethod
    def _read(quantization: dict[str, Any]) -> Format:
        from vllm_nvfp4_moe.loading import formats

        found = formats.from_checkpoint(quantization)
        if found is None:
            raise ValueError(_NOT_OURS.format(found=f"this one has {sorted(quantization)}"))
        return found

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Establish which gates the experts apply, by the checkpoint's contract, or by the model's
        Transformers class if it has none. vLLM calls this once, before it builds layers.

        Also reads what the ``quantization_config`` left to ``hf_quant_config.json``.

        Args:
            model_name: the checkpoint's folder or its name on the hub.
            hf_config: the model's config, as Transformers or vLLM made it.
            revision: of the model on the hub.

        Raises:
            ValueError: if the gates cannot be established, the model cannot run on this platform,
                or it is not said which of its modules are quantized how.
        """
        from vllm.platforms import current_platform
        from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

        from quantize.errors import QuantizeError
        from quantize.experts.gates import KEY, from_contract
        from quantize.experts.identify import identify, identify_config
        from quantize.layouts.modelopt import MIXED
        from vllm_nvfp4_moe import gpu_only
        from vllm_nvfp4_moe.loading import formats

        online = self.online_quantization_config  # from the user's --quantization-config
        if online is not None and online.args.moe is not None:
            raise ValueError(
                "--quantization nvfp4_moe takes the experts as the checkpoint has them; "
                "remove 'moe' from --quantization-config"
            )
        if current_platform.is_cpu() and (problem := gpu_only.refusal(hf_config)):
            raise ValueError(problem)
        if self._format is None:
            file = "hf_quant_config.json"
            quantization = get_hf_file_to_dict(file, model_name, revision)
            if not quantization or formats.needs_layers(quantization):
                raise ValueError(
                    f"{model_name}: its quantization is {MIXED}, and neither config.json "
                    f"nor {file} has the quantized_layers that say what is what"
                )
            self._format = self._read(quantization)
        contract = getattr(hf_config, KEY, None)
        if contract is None:  # vLLM makes configs of its own for some draft models
            contract = (get_hf_file_to_dict("config.json", model_name, revision) or {}).get(KEY)
        try:
            if contract is not None:
                self.gates = from_contract(contract, f"{model_name}/config.json")
            else:
                try:
                    gates = identify_config(hf_config)
                except QuantizeError:
                    # vLLM has config classes of its own, MiniMax-M3's among them.
                    gates = identify(model_name)
                # NVFP4 layouts store gate and up apart; plain floats may be as the class has them.
                self.gates = gates if self.format.on_the_fly else gates.concatenated()
                logger.info("%s has no gate contract; its class applies %s", model_name, self.gates)
        except QuantizeError as error:
            raise ValueError(
                f"{model_name}: cannot establish which gate its experts apply, and a wrong one "
                f"gives wrong text without any error: {error}"
            ) from error

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        stock = self.format.stock
        # vLLM sets this mapping on the outer config, by reference, after construction.
        stock.packed_modules_mapping = self.packed_modules_mapping
        if not isinstance(layer, RoutedExperts):
            return stock.get_quant_method(layer, prefix)
        weight_only = self.format.weight_only(layer, prefix)
        if weight_only is None:
            return stock.get_quant_method(layer, prefix)
        from vllm_nvfp4_moe.backends import choose

        return choose(self.context, layer, weight_only)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.format.stock.apply_vllm_mapper(hf_to_vllm_mapper)
