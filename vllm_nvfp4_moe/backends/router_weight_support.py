"""The router's weights where they are for the experts' input (Llama 4's), on vLLM's kernels.

vLLM's step before the experts then weighs the tokens. Of the experts themselves, which get the same
flag, Marlin multiplies the first product by the weights again, vLLM's CUTLASS the input, and
FlashInfer's the output: a token would be weighed twice, without a word. Humming stops at an
assertion. (Read in vLLM 0.32 and 0.33; docs/operators/backends.md has the places.) So the method
weighs the tokens, and kernels get weights of one: they all do the same with these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

_ROUTES_SO = "FLASHINFER_TRTLLM"
"""Its monolithic class routes as Llama 4 does, and checks that this is asked for."""


def weighed(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens times their weights, in their own dtype as vLLM does it, and weights of one.

    Args:
        x: ``[tokens, hidden]``.
        weights: the router's, float32 ``[tokens, 1]``.
    """
    return x * weights.to(x.dtype), torch.ones_like(weights)


def routes_otherwise(backend: NvFp4MoeBackend, experts_cls: type[FusedMoEExperts]) -> str | None:
    """Why a kernel cannot be used where the router's weights are for the input; None if it can."""
    if not experts_cls.is_monolithic() or backend.value == _ROUTES_SO:
        return None
    return "its NVFP4 kernels route by themselves, and weigh what comes out of the experts"
