"""Kernels that quantize weights: a slow reference, and fast ones for CPUs and GPUs.

:func:`for_device` chooses a kernel, and ``kernel.quantize_weights`` quantizes weights with one.
Every kernel gives the same bits as the reference (``tests/quantize/test_kernels.py``). To add one,
write one file here with a class like ``quantize.nvfp4.kernels.kernel.Kernel`` and add one line to
:func:`for_device`.

This room may import ``quantize.nvfp4.format`` and ``quantize.nvfp4.scales``.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from quantize.nvfp4.kernels.kernel import Kernel

logger = logging.getLogger("vllm.nvfp4_moe.quantize")
"""Below vLLM's logger, whose handlers it has in a server; elsewhere its warnings are seen."""


def for_device(device: torch.device) -> Kernel:
    """The fastest kernel for weights that are on ``device``."""
    if device.type == "cuda":
        from quantize.nvfp4.kernels.triton_gpu import TritonKernel

        return TritonKernel()
    return _for_cpus()


@cache
def _for_cpus() -> Kernel:
    from quantize.native import environment, jit
    from quantize.nvfp4.kernels import cpp_cpu

    here = [each for each in cpp_cpu.INSTRUCTIONS if each.here] if environment.cpp() else []
    try:
        if kernel := jit.first_made(here, cpp_cpu.CppKernel):
            return kernel
    except jit.KernelError as error:
        logger.warning("numba quantizes, which is slower than C++ would be: %s", error)
    from quantize.nvfp4.kernels.numba_cpu import NumbaKernel

    return NumbaKernel()
