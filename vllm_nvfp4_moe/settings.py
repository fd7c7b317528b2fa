"""Every option of the plugin, in one place. Nothing else in this package reads the environment.

===========================  ======================================================================
variable                     meaning
===========================  ======================================================================
``NVFP4_MOE_SELF_CHECK``     ``0`` turns off the check that each kind of layer gets at load.
``NVFP4_MOE_HOPPER``         ``0`` leaves Hopper GPUs to vLLM's own kernels.
``NVFP4_MOE_CPP``            ``0`` has numba compile the CPU's kernel, not the C++ compiler.
``NVFP4_MOE_ACTIVATIONS``    ``bf16`` (the default) or ``fp8``: what our Hopper kernel multiplies.
                             ``bf16``, if it is said: so do all kernels, whatever the checkpoint
                             says. ``nvfp4``: experts that are quantized while they load have input
                             scales of 1.0, for kernels with 4-bit activations.
``NVFP4_MOE_CACHE``          The folder of compiled kernels, by default ``nvfp4_moe`` in vLLM's
                             (``VLLM_CACHE_ROOT``).
``NVFP4_MOE_ANY_VLLM``       ``1`` tries a vLLM of a version that this package does not know.
===========================  ======================================================================

Beside them, the plugin respects two variables of vLLM by which users have the activations of vLLM's
own kernels quantized, says when FlashInfer's for four over six is set, and looks at CUDA's two that
say where its compiler is and at ``CXX``, the C++ compiler.

Variables are read when a function here is called, not when it is imported. An empty variable counts
as one that is not set. This module imports nothing heavy: vLLM loads it in each of its processes.
"""

from __future__ import annotations

import os

from quantize.native.environment import CACHE as CACHE
from quantize.native.environment import CPP as CPP

NAME = "nvfp4_moe"
"""What users give to ``--quantization``."""

SELF_CHECK = "NVFP4_MOE_SELF_CHECK"
HOPPER = "NVFP4_MOE_HOPPER"
ACTIVATIONS = "NVFP4_MOE_ACTIVATIONS"
ANY_VLLM = "NVFP4_MOE_ANY_VLLM"

BF16 = "bf16"
NVFP4 = "nvfp4"
"""Values of ``NVFP4_MOE_ACTIVATIONS``."""

HUMMING_INPUT = "VLLM_HUMMING_INPUT_QUANT_CONFIG"
"""vLLM's: how Humming quantizes activations."""
MARLIN_INPUT = "VLLM_MARLIN_INPUT_DTYPE"
"""vLLM's: the type to which Marlin quantizes activations."""
FOUR_OVER_SIX = "FLASHINFER_NVFP4_4OVER6"
"""FlashInfer's: the largest value of a block of activations becomes 6 or 4, whichever is better."""


def self_check() -> bool:
    """Whether layers are checked at load (``NVFP4_MOE_SELF_CHECK``)."""
    return os.environ.get(SELF_CHECK, "1") != "0"


def hopper() -> bool:
    """Whether our kernel may be chosen on a Hopper GPU (``NVFP4_MOE_HOPPER``)."""
    return os.environ.get(HOPPER, "1") != "0"


def hopper_activations() -> str:
    """The type of the activations that our Hopper kernel multiplies (``NVFP4_MOE_ACTIVATIONS``).

    Whoever has the kernels checks that there is one of that name.
    """
    asked = os.environ.get(ACTIVATIONS) or BF16
    return BF16 if asked == NVFP4 else asked


def activations_stay() -> bool:
    """Whether the user has said that activations stay as they are on any kernel, also where the
    checkpoint has input scales (``NVFP4_MOE_ACTIVATIONS``)."""
    return os.environ.get(ACTIVATIONS) == BF16


def four_over_six() -> bool:
    """Whether the user has asked FlashInfer's kernels for it, as FlashInfer reads it."""
    return os.environ.get(FOUR_OVER_SIX) == "1"


def on_the_fly_activations() -> bool:
    """Whether activations are quantized too at experts that are quantized while they load
    (``NVFP4_MOE_ACTIVATIONS``)."""
    return os.environ.get(ACTIVATIONS) == NVFP4


def any_vllm() -> bool:
    """Whether a vLLM of an unknown version is to be tried (``NVFP4_MOE_ANY_VLLM``)."""
    return os.environ.get(ANY_VLLM) == "1"


def humming_input() -> str | None:
    """What the user wants Humming to quantize activations to; None if that was not said."""
    return os.environ.get(HUMMING_INPUT) or None


def marlin_input() -> str | None:
    """What the user wants Marlin to quantize activations to; None if that was not said."""
    return os.environ.get(MARLIN_INPUT) or None
