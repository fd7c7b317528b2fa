"""Our Hopper kernels, by the type of the activations that they multiply. A new one is a module with
``hopper_moe``'s ``Experts``, ``run`` and ``library``, and one entry here."""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple

from vllm_nvfp4_moe.kernels import hopper_fp8, hopper_moe

VARIABLE = "NVFP4_MOE_ACTIVATIONS"


class Variant(NamedTuple):
    """What the line at load calls it, its module, and the bits of an activation."""

    name: str
    kernels: ModuleType
    bits: int


VARIANTS = {
    "bf16": Variant("HOPPER (vllm_nvfp4_moe)", hopper_moe, 16),
    "fp8": Variant("HOPPER FP8 (vllm_nvfp4_moe)", hopper_fp8, 8),
}


def asked() -> str:
    """Which of :data:`VARIANTS` the user wants.

    Raises:
        ValueError: if it is none of them.
    """
    name = os.environ.get(VARIABLE) or "bf16"
    if name not in VARIANTS:
        raise ValueError(f"NVFP4_MOE_ACTIVATIONS={name}: must be one of {', '.join(VARIANTS)}")
    return name
