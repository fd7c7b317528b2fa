"""What this machine is: hardware, versions, and whether vLLM sees the plugin."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import torch

from vllm_nvfp4_moe import measured, versions
from vllm_nvfp4_moe.settings import NAME

_PACKAGES = (
    *("torch", "transformers", "triton", "flashinfer-python", "humming-kernels", "b12x"),
    *("compressed-tensors", "numba"),
)


def about() -> dict[str, Any]:
    """Hardware and versions, for the result's head. Nothing is computed."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **measured.device(),
        "cpu": measured.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "vllm": versions.installed_version(),
        "plugin": version("vllm-nvfp4-moe"),
        "cuda": torch.version.cuda,
    }
    packages: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {**found, "packages": packages, **_capability()}


def _capability() -> dict[str, Any]:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return {"capability": None, "gpus": 0}
    capability = current_platform.get_device_capability()
    return {
        "capability": None if capability is None else capability.as_version_str(),
        "gpus": torch.cuda.device_count(),
    }


def unseen() -> str | None:
    """Why vLLM does not see this package's plugin, None if it does."""
    points = entry_points(group="vllm.general_plugins")
    if NAME not in {point.name for point in points}:
        return (
            "its entry point is not among those of vllm.general_plugins: is vllm-nvfp4-moe "
            "installed in vLLM's environment?"
        )
    if problem := versions.unsupported_version():
        return problem
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if NAME not in QUANTIZATION_METHODS:
        return "vLLM has not loaded it: does VLLM_PLUGINS name others alone?"
    return None
