"""Methods of vLLM's own classes that are exchanged when vLLM registers the plugin.

Each acts for our checkpoints alone, and belongs to an entry of ``quirks.QUIRKS``. vLLM may register
plugins more than once: a method is exchanged once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.settings import NAME

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.metrics.loggers import PrometheusStatLogger


def count_as_nvfp4() -> None:
    """Have vLLM count our models as NVFP4 where it would without this package (``NAMED_NVFP4``)."""
    from vllm.config.model import ModelConfig

    stock = ModelConfig.is_nvfp4_quantized
    if stock.__module__ == __name__:  # vLLM may register plugins more than once
        return

    def is_nvfp4_quantized(self: ModelConfig) -> bool:
        if self.quantization != NAME:
            return stock(self)
        from vllm.model_executor.layers.quantization import get_quantization_config

        quirks.NAMED_NVFP4.log()
        described = self.model_arch_config.quantization_config
        as_stock = copy.copy(self)
        as_stock.quantization = (described or {}).get("quant_method")
        for name in ("modelopt_fp4", "modelopt_mixed"):
            if get_quantization_config(name).override_quantization_method(described, None):
                as_stock.quantization = name
        return stock(as_stock)

    ModelConfig.is_nvfp4_quantized = is_nvfp4_quantized


def show_metrics(show: Callable[[str], bool]) -> None:
    """Have vLLM's API servers call ``show``, with the model's name, once they show their own
    metrics (``NO_METRICS_OF_WORKERS``); it says whether it had any."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    stock = PrometheusStatLogger.log_engine_initialized
    if stock.__module__ == __name__:  # vLLM may register plugins more than once
        return

    def log_engine_initialized(self: PrometheusStatLogger) -> None:
        stock(self)
        if show(str(self.vllm_config.model_config.served_model_name)):
            quirks.NO_METRICS_OF_WORKERS.log()

    PrometheusStatLogger.log_engine_initialized = log_engine_initialized


def build_ungated_on_cpus(ours: Callable[[VllmConfig], bool]) -> None:
    """Have vLLM build layers whose experts have no gate on CPUs, too, in models that are ``ours``
    (``UNGATED_ON_CPUS``)."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.platforms import current_platform

    stock = FusedMoEConfig.__post_init__
    if stock.__module__ == __name__:
        return

    def post_init(self: FusedMoEConfig) -> None:
        try:
            stock(self)
        except NotImplementedError:
            config = get_current_vllm_config_or_none()
            refused = not self.is_act_and_mul and current_platform.is_cpu()
            if not refused or config is None or not ours(config):
                raise
            quirks.UNGATED_ON_CPUS.log()

    FusedMoEConfig.__post_init__ = post_init


def watch_what_is_built(
    ours: Callable[[VllmConfig], bool], watched: Callable[..., torch.nn.Module]
) -> None:
    """Have vLLM's loaders build models that are ``ours`` through ``watched``, whose arguments are
    what builds one, the configs, and the format to load (``MUSE_SPARK``,
    ``UNCHECKED_PARAMETERS``)."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    stock = BaseModelLoader.create_model
    if stock.__module__ == __name__:
        return

    def create_model(
        self: BaseModelLoader, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        build = partial(stock, self, vllm_config, model_config, prefix)
        # Of draft models that are not quantized vLLM looks itself.
        if not ours(vllm_config) or model_config.quantization is None:
            return build()
        return watched(build, vllm_config, model_config, self.load_config.load_format)

    BaseModelLoader.create_model = create_model
