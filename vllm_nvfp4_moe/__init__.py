"""vLLM plugin: ``vllm serve CKPT --quantization nvfp4_moe``.

vLLM calls :func:`register` at the start of each of its processes (entry point
``vllm.general_plugins``). Nothing heavy is imported here: the rest of this package loads when vLLM
first looks for its quantization methods.
"""

from __future__ import annotations

import logging

from vllm_nvfp4_moe import compat

NAME = "nvfp4_moe"

# Below vLLM's own logger, so that its handlers and level apply.
logger = logging.getLogger("vllm.nvfp4_moe")


def register() -> None:
    """Make ``--quantization nvfp4_moe`` known to vLLM; harmless if called again.

    With a vLLM of another version, it logs one error and leaves vLLM as it is: other models of the
    same installation go on working.
    """
    problem = compat.unsupported_version()
    if problem:
        logger.error("%s", problem)
        return
    compat.when_imported("vllm.model_executor.layers.quantization", _register_config)
    compat.when_imported("vllm.model_executor.models.registry", compat.explain_gpu_only_models)


def _register_config() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if NAME in QUANTIZATION_METHODS:
        return
    from vllm_nvfp4_moe.config import NvFp4MoEConfig

    register_quantization_config(NAME)(NvFp4MoEConfig)
