"""A model of ours between being built and being loaded, which is where its parameters are all there
and hold nothing yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vllm_nvfp4_moe.loading import muse_spark, plain

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def watched(
    build: Callable[[], torch.nn.Module],
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    load_format: str,
) -> torch.nn.Module:
    """What ``build`` returns, which vLLM loads next.

    Args:
        model_config: of the model that is built: a draft model has one of its own.
        load_format: as ``--load-format``.

    Raises:
        RefusedError: if vLLM's class for Muse Spark cannot run the checkpoint so.
    """
    with muse_spark.explained():
        model = build()
    if load_format in plain.FROM_FILES:
        quantization: Any = vllm_config.quant_config
        muse_spark.load_one_by_one(model, quantization.stored)
        plain.guard(model, str(model_config.model), model_config.runner_type == "draft")
    return model
