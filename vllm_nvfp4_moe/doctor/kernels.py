"""All kernels that there are for NVFP4 experts, which of them could run here, and which would be
chosen."""

from __future__ import annotations

import textwrap
from typing import Any

import torch

from vllm_nvfp4_moe import backends
from vllm_nvfp4_moe.doctor.layer import Way, WrongKernelError, make, told_to
from vllm_nvfp4_moe.doctor.shape import Shape

VARIANTS = ("weights only", "4-bit activations")
"""What the checkpoint asks for."""

AUTO = Way("auto", "", "", activations="")
"""What vLLM and this package choose by themselves."""


def ways() -> dict[str, Way]:
    """By the name of each kernel, how to ask for it. Names are those of backends'
    ``kernel_names``."""
    found = {}
    for method in backends.methods():
        for name in method.kernel_names():
            family, _, rest = name.partition(" ")
            if family == "hopper":
                way = Way("auto", method.__name__, "HOPPER", activations=rest)
            elif family == "cpu":
                way = Way("auto", method.__name__, "", "", f"inf={rest}")
            else:
                way = Way(name, method.__name__, "", "")
            found[name] = way
    return found


def survey(shape: Shape, variant: str, device: torch.device) -> dict[str, Any]:
    """What could run ``shape`` here, by vLLM's and this package's own answers. Nothing is computed,
    but Hopper kernels are compiled.

    Args:
        variant: one of ``VARIANTS``.

    Returns:
        ``kernels``: by name, why it cannot run, or None; ``chosen``: the name of the kernel that
        this package chooses; ``stock``: of the one that vLLM chooses without it. Either is None if
        there is none.
    """
    every = ways()
    weights_only = variant == VARIANTS[0]
    reasons = {name: _reason(shape, way, weights_only) for name, way in every.items()}
    chosen = stock = None
    try:
        auto = make(shape, AUTO, torch.device("meta"), weights_only)
        chosen = name_of(auto.method)
        stock = _stock(auto, weights_only)
    except Exception as error:
        return {"kernels": reasons, "chosen": None, "stock": None, "problem": told(error)}
    return {"kernels": reasons, "chosen": chosen, "stock": stock}


def name_of(method: Any) -> str | None:
    """The name of the kernel that a layer's method runs."""
    family = type(method).__name__
    if family == "HopperMethod":
        return f"hopper {'bf16' if method.activation_bits == 16 else 'fp8'}"
    if family == "CpuMethod":
        from vllm_nvfp4_moe.backends.cpu.forward import NUMBA, native

        kernel = native(torch.bfloat16)
        return f"cpu {NUMBA if kernel is None else kernel.variant.instructions.name}"
    return _vllm_name(method.nvfp4_backend)


def _vllm_name(backend: Any) -> str | None:
    from vllm_nvfp4_moe.backends.vllm_kernels import backend_names

    return next((name for name, each in backend_names().items() if each == backend), None)


def _stock(layer: Any, weights_only: bool) -> str | None:
    """The kernel that vLLM would choose for such a layer without this package."""
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import select_nvfp4_moe_backend
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        kNvfp4Dynamic,
        kNvfp4Static,
    )
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    key = None if weights_only else kNvfp4Dynamic
    try:
        backend, _ = select_nvfp4_moe_backend(layer.experts.moe_config, kNvfp4Static, key)
    except (ValueError, NotImplementedError):
        return None
    return _vllm_name(backend)


def _reason(shape: Shape, way: Way, weights_only: bool) -> str | None:
    if problem := _no_instructions(way):
        return problem
    try:
        layer = make(shape, way, torch.device("meta"), weights_only)
    except Exception as error:  # whatever a kernel's requirements raise is a reason
        return told(error)
    try:
        layer.check(way)
    except WrongKernelError as error:
        from vllm.config import set_current_vllm_config

        (method,) = (each for each in backends.methods() if each.__name__ == way.method)
        with told_to(way), set_current_vllm_config(layer.config):
            return method.unsupported(layer.experts) or told(error)
    return None


def _no_instructions(way: Way) -> str | None:
    """Why the loops for this processor's instructions cannot be compiled or loaded."""
    from quantize.native.jit import KernelError
    from vllm_nvfp4_moe.backends.cpu.forward import NUMBA
    from vllm_nvfp4_moe.kernels.cpu.kernel import kernel_named

    name = way.cpu.partition("=")[2]
    if name in ("", NUMBA):
        return None
    try:
        kernel_named(name)
    except KernelError as error:
        return told(error)
    return None


def told(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    text = text.rpartition("Asked: ")[2]  # of this package's selection: the kernel's own reason
    return textwrap.shorten(text or type(error).__name__, 300, placeholder=" ...")
