"""Which of vLLM's NVFP4 kernels leave the router's weights to the experts' input (Llama 4's).

vLLM then weighs the tokens before the experts run, and does not ask whether the kernels weigh what
comes out as well. Humming stops at an assertion in the first step. FlashInfer's kernels get the
router's weights all the same, and a token would be weighed twice, without a word. Where others do
it was read in vLLM 0.32 and 0.33 (docs/operators/backends.md has the places).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

_LEAVES_THEM = ("MARLIN", "VLLM_CUTLASS", "EMULATION")
_ROUTES_ITSELF = "FLASHINFER_TRTLLM"
"""Its monolithic class routes as Llama 4 does, and checks that this is asked for."""


def weighs_again(backend: NvFp4MoeBackend, experts_cls: type[FusedMoEExperts]) -> str | None:
    """Why a kernel cannot be used where the router's weights are for the input; None if it can."""
    if backend.value in _LEAVES_THEM:
        return None
    if backend.value == _ROUTES_ITSELF and experts_cls.is_monolithic():
        return None
    return "its NVFP4 kernels do not leave the router's weights to the experts' input"
