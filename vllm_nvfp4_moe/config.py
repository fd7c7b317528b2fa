"""Which checkpoints this package takes: what vLLM asks before it knows a model's config.

It takes those that ``--quantization nvfp4_moe`` is said for, and those with a gate contract that no
method is named for. What then serves them is one of :mod:`vllm_nvfp4_moe.formats`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_nvfp4_moe import shadowing
from vllm_nvfp4_moe.settings import NAME

# All else is imported below: vLLM imports this module in each of its processes, whatever it serves.

logger = init_logger("vllm.nvfp4_moe.config")


class NvFp4MoEConfig(QuantizationConfig):
    """What vLLM has registered under our name. No object is of this class: it makes those of
    :mod:`vllm_nvfp4_moe.formats`, each of which is vLLM's own config of a layout, too.

    Without arguments, as vLLM makes the config of a checkpoint that is not quantized, it is the one
    that quantizes experts while they load.
    """

    def __new__(cls) -> QuantizationConfig:
        from vllm_nvfp4_moe.formats import OnTheFly

        return OnTheFly()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """The config of a checkpoint with this ``quantization_config``.

        Raises:
            ValueError: if nothing in it is NVFP4 in a known layout, or vLLM cannot read it.
        """
        from vllm_nvfp4_moe.formats import from_checkpoint

        return from_checkpoint(config)

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # vLLM then makes the config of an unquantized checkpoint without arguments

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> Any:
        """Our name, if the checkpoint is ours to serve; else None.

        vLLM calls this for each quantized checkpoint, draft models among them.

        Args:
            hf_quant_cfg: ``quantization_config`` of the checkpoint's ``config.json``.
            user_quant: what ``--quantization`` says. For the multi-token-prediction layers of a
                model, it is what was chosen for the model.
            hf_config: the model's config.

        Raises:
            ValueError: if the user named us, and nothing in the checkpoint is NVFP4.
        """
        contract = getattr(hf_config, NAME, None)
        if user_quant != NAME and contract is None:
            return None  # before anything is imported: this may be any model
        shadowing.claim()
        from quantize.layouts import detect

        ours = isinstance(hf_quant_cfg, dict) and detect(hf_quant_cfg) is not None
        if user_quant == NAME:
            if not ours:
                from vllm_nvfp4_moe.formats import not_ours

                raise ValueError(not_ours(hf_quant_cfg))
            return NAME
        if ours and user_quant is not None:
            _warn(contract, user_quant)
        return NAME if ours and user_quant is None else None

    def get_name(self) -> Any:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        raise NotImplementedError

    @classmethod
    def get_min_capability(cls) -> int:
        raise NotImplementedError

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        raise NotImplementedError


def _warn(contract: Any, method: str) -> None:
    """Say that ``method``, which the user named, does not look at the checkpoint's contract."""
    from quantize.errors import QuantizeError
    from quantize.experts.gates import Gate, from_contract

    try:
        applied = str(from_contract(contract))
    except QuantizeError as error:
        applied = f"what nobody knows ({error})"
    if applied != str(Gate("silu")):
        logger.warning_once(
            "THE GATE MAY BE WRONG, AND THE TEXT WITH IT: this checkpoint's experts apply %s, and "
            "--quantization %s does not look: vLLM's class for the model decides, and its "
            "Transformers backend applies SiLU. Leave --quantization away, or say nvfp4_moe",
            applied,
            method,
        )
