"""Which checkpoints and layers are ours.

A checkpoint is claimed only when the user says ``--quantization nvfp4_moe``. Its routed experts
get this package's method; everything else is left to the stock config of its layout, so that dense
layers, KV caches and mixed layouts behave as in vLLM without the plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_nvfp4_moe import NAME

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.models.utils import WeightsMapper

    from quantize.gates import Gates
    from quantize.layouts import Layout

logger = init_logger("vllm.nvfp4_moe.config")

_NOT_OURS = (
    "--quantization nvfp4_moe needs a checkpoint whose routed experts are NVFP4, in ModelOpt's or "
    "compressed-tensors' layout, and {found}. Make one with: nvfp4-moe quantize SOURCE TARGET"
)


class NvFp4MoEConfig(QuantizationConfig):
    """The quantization config that ``--quantization nvfp4_moe`` selects.

    Args:
        layout: of the checkpoint; its tensor names and scale conventions.
        stock: vLLM's own config for that layout, for everything but routed experts.
        weight_only: the checkpoint asks for unquantized activations and has no input scales.
    """

    def __init__(
        self,
        layout: Layout | None = None,
        stock: QuantizationConfig | None = None,
        weight_only: bool = False,
    ) -> None:
        if layout is None or stock is None:
            # How vLLM builds the config of a checkpoint that has no quantization_config.
            raise ValueError(_NOT_OURS.format(found="this one is not quantized"))
        self.layout = layout
        self.stock = stock
        self.weight_only = weight_only
        self.gates: Gates | None = None
        super().__init__()

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
        return []  # config.json's quantization_config is enough, and says more

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
        from quantize.layouts import detect

        layout = detect(config)
        if layout is None:
            raise ValueError(_NOT_OURS.format(found=f"this one has {sorted(config)}"))
        stock: QuantizationConfig
        if layout.name == "modelopt":
            from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

            stock = ModelOptNvFp4Config.from_config(config)
            weight_only = stock.quant_method == "W4A16_NVFP4"
        else:
            from vllm.model_executor.layers.quantization.compressed_tensors import (
                compressed_tensors,
            )

            stock = compressed_tensors.CompressedTensorsConfig.from_config(config)
            groups = config["config_groups"].values()
            weight_only = all(group.get("input_activations") is None for group in groups)
        return cls(layout, stock, weight_only)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Establish the gates: the checkpoint's contract, else the model's Transformers class."""
        from vllm.platforms import current_platform

        from quantize.errors import QuantizeError
        from quantize.gates import KEY, from_contract
        from quantize.identify import identify, identify_config
        from vllm_nvfp4_moe import compat

        online = self.online_quantization_config  # from the user's --quantization-config
        if online is not None and online.args.moe is not None:
            raise ValueError(
                "--quantization nvfp4_moe takes the experts as the checkpoint has them; "
                "remove 'moe' from --quantization-config"
            )
        if current_platform.is_cpu() and (problem := compat.gpu_only_model(hf_config)):
            raise ValueError(problem)
        contract = getattr(hf_config, KEY, None)
        try:
            if contract is not None:
                self.gates = from_contract(contract, f"{model_name}/config.json")
            else:
                try:
                    gates = identify_config(hf_config)
                except QuantizeError:
                    # vLLM has config classes of its own, MiniMax-M3's among them.
                    gates = identify(model_name)
                self.gates = gates.concatenated()
                logger.info("%s has no gate contract; its class applies %s", model_name, self.gates)
        except QuantizeError as error:
            raise ValueError(
                f"{model_name}: cannot establish which gate its experts apply, and a wrong one "
                f"gives wrong text without any error: {error}"
            ) from error

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        # vLLM sets this mapping on the outer config, by reference, after construction.
        self.stock.packed_modules_mapping = self.packed_modules_mapping
        if not isinstance(layer, RoutedExperts) or self._left_as_is(layer, prefix):
            return self.stock.get_quant_method(layer, prefix)
        from vllm_nvfp4_moe.backends import choose

        return choose(self, layer)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.stock.apply_vllm_mapper(hf_to_vllm_mapper)

    def _left_as_is(self, layer: RoutedExperts, prefix: str) -> bool:
        """Whether the checkpoint excludes these experts from quantization."""
        stock: Any = self.stock
        if self.layout.name == "modelopt":
            return bool(stock.is_layer_excluded(prefix))
        from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
            should_ignore_layer,
        )

        return bool(
            should_ignore_layer(
                f"{prefix}.0.{layer.ckpt_down_proj_name}",
                stock.ignore,
                fused_mapping=self.packed_modules_mapping,
            )
        )
