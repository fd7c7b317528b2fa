"""The Hopper kernels by the type of the activations that they multiply.

A new one is a subclass of ``HopperKernel`` in a file of its own, with its ``.cu``, and one entry
here.
"""

from __future__ import annotations

from vllm_nvfp4_moe.kernels.hopper.bf16 import Bf16Kernel
from vllm_nvfp4_moe.kernels.hopper.fp8 import Fp8Kernel
from vllm_nvfp4_moe.kernels.hopper.kernel import HopperKernel

KERNELS: dict[str, HopperKernel] = {"bf16": Bf16Kernel(), "fp8": Fp8Kernel()}
"""By the values that ``NVFP4_MOE_ACTIVATIONS`` may have."""
