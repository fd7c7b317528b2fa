"""Kernels that quantize: the reference arithmetic at the hardware's speed.

A new kernel is one file here, with a class like ``quantize.nvfp4.kernels.kernel.Kernel``, and a
line in :func:`for_device`. Whatever the kernel, the result is the reference's bit for bit
(``tests/quantize/test_kernels.py``).
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
