"""Kernels that quantize weights: a slow reference, and fast ones for CPUs and GPUs.

:func:`for_device` chooses a kernel, and ``kernel.quantize_weights`` quantizes weights with one.
Every kernel gives the same bits as the reference (``tests/quantize/test_kernels.py``). To add one,
write one file here with a class like ``quantize.nvfp4.kernels.kernel.Kernel`` and add one line to
:func:`for_device`.

This room may import ``quantize.nvfp4.format`` and ``quantize.nvfp4.scales``.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.kernels.kernel import Kernel


def for_device(device: torch.device) -> Kernel:
    """The fastest kernel for weights that are on ``device``."""
    if device.type == "cuda":
        from quantize.nvfp4.kernels.triton_gpu import TritonKernel

        return TritonKernel()
    from quantize.nvfp4.kernels.numba_cpu import NumbaKernel

    return NumbaKernel()
