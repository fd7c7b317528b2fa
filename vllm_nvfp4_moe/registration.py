"""What vLLM calls first: makes ``--quantization nvfp4_moe`` known to it.

vLLM calls :func:`register` in each of its processes, before it imports its quantization methods and
its models. Importing those early would slow every start, and would import torch in processes that
need none of it. So :func:`register` leaves callbacks, which run right after vLLM has imported the
module that they add to.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_nvfp4_moe import settings, versions
from vllm_nvfp4_moe.settings import NAME

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.nvfp4_moe")
"""Its name is below that of vLLM's logger, so that vLLM's handlers and level apply."""


def register() -> None:
    """Make ``--quantization nvfp4_moe`` known to vLLM. A second call does nothing.

    With a vLLM of another version, this logs one error and leaves vLLM as it is: other models of
    the same installation go on working. ``NVFP4_MOE_ANY_VLLM=1`` registers all the same.
    """
    problem = versions.unsupported_version()
    if problem and not settings.any_vllm():
        logger.error("%s", problem)
        return
    if problem:
        logger.warning(
            "%s=1: vLLM %s is tried, with which vllm-nvfp4-moe was never run",
            settings.ANY_VLLM,
            versions.installed_version(),
        )
    when_imported("vllm.model_executor.layers.quantization", _register_config)
    when_imported("vllm.model_executor.models.registry", _register_gpu_only_models)
    when_imported("vllm.config.model", _count_as_nvfp4)
    when_imported("vllm.model_executor.layers.fused_moe.config", _build_ungated_on_cpus)
    when_imported("vllm.model_executor.model_loader.base_loader", _watch_what_is_built)
    when_imported("vllm.v1.metrics.loggers", _show_metrics)
    when_imported("vllm.ray.ray_env", _give_settings_to_ray)


def _register_config() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if NAME in QUANTIZATION_METHODS:
        return
    from vllm_nvfp4_moe.config import NvFp4MoEConfig

    register_quantization_config(NAME)(NvFp4MoEConfig)


def _register_gpu_only_models() -> None:
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_nvfp4_moe.gpu_only import ARCHITECTURES, GpuOnlyModel

        for architecture in ARCHITECTURES:
            ModelRegistry.register_model(architecture, GpuOnlyModel)


def _count_as_nvfp4() -> None:
    from vllm_nvfp4_moe import exchanged

    exchanged.count_as_nvfp4()


def _build_ungated_on_cpus() -> None:
    from vllm_nvfp4_moe import exchanged

    exchanged.build_ungated_on_cpus(_is_ours)


def _watch_what_is_built() -> None:
    from vllm_nvfp4_moe import exchanged

    def watched(*args: Any) -> torch.nn.Module:
        from vllm_nvfp4_moe.loading import built

        return built.watched(*args)

    exchanged.watch_what_is_built(_is_ours, watched)


def _is_ours(config: VllmConfig) -> bool:
    """Whether a model with this config is one of ours."""
    # Of another model's config, nothing more of this package is imported.
    module = sys.modules.get("vllm_nvfp4_moe.experts_config")
    return module is not None and isinstance(config.quant_config, module.ExpertsConfig)


def _show_metrics() -> None:
    from vllm_nvfp4_moe import exchanged, metrics

    exchanged.show_metrics(metrics.show)


def _give_settings_to_ray() -> None:
    """Let vLLM copy this package's variables from the driver to its workers on Ray, as it copies
    its own. Without them, workers would serve as if nothing had been set."""
    from vllm.ray.ray_env import DEFAULT_ENV_VAR_PREFIXES

    DEFAULT_ENV_VAR_PREFIXES.add(f"{NAME.upper()}_")


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Call ``callback`` now if the module ``name`` has been imported, else as soon as it has been.

    A second call for the same module, before it is imported, does nothing.
    """
    if name in sys.modules:
        _guarded(callback)
    elif not any(isinstance(f, _AfterImport) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, callback))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``callback`` once, right after the module ``name`` has been executed."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name = name
        self.callback = callback
        self.busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or self.busy:
            return None
        self.busy = True  # the search below asks this finder again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _guarded(self.callback)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _guarded(callback: Callable[[], None]) -> None:
    """Call it. An error of ours must not stop vLLM from importing its own modules: other models
    need them too."""
    try:
        callback()
    except Exception:
        logger.exception("vllm-nvfp4-moe could not register; vLLM goes on without it")
