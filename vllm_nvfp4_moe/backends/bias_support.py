"""Which of vLLM's NVFP4 kernels add experts' biases, and how Marlin wants to have them.

vLLM does not ask: of its NVFP4 backends only the emulation says by itself that it adds none. The
others that are not listed here were read to leave biases out, or nobody has read them
(docs/operators/backends.md has the places).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_bias

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

_ADDS = ("MARLIN", "HUMMING")
"""Each GEMM adds them to what it has scaled, before the gate and before the router's weights."""


def drops_biases(backend: NvFp4MoeBackend) -> str | None:
    """Why ``backend`` would not add experts' biases, None if it does."""
    return None if backend.value in _ADDS else "its NVFP4 kernels add no biases to experts"


def marlin_w13_bias(bias: torch.Tensor, parts: int, rows: int) -> torch.Tensor:
    """w13's biases as Marlin reads them.

    Args:
        bias: ``[experts, parts * n]``: all of gate and then all of up, or up alone.
        rows: ``parts`` times n with the zeros after it that vLLM pads Marlin's weights by.
    """
    matrices = bias.unflatten(1, (parts, -1))
    padded = torch.nn.functional.pad(matrices, (0, rows // parts - matrices.shape[2]))
    return _permuted(padded.flatten(1))


def marlin_w2_bias(bias: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """w2's biases as Marlin reads them.

    For NVFP4, Marlin multiplies the second GEMM by the router's weight and by the global scale in
    one step, after it has added the biases: ``(product + bias) * (weight * scale)``
    (``marlin_template.h`` of vLLM's ``marlin_moe_wna16``, ``read_moe_block_data`` and ``write``).

    Args:
        bias: ``[experts, hidden]``.
        global_scale: float32 ``[experts]``, as Marlin has it.
    """
    return _permuted((bias.float() / global_scale.unsqueeze(1)).to(bias.dtype))


def _permuted(bias: torch.Tensor) -> torch.Tensor:
    # In runs of 32 columns, so that all experts can be permuted at once.
    return marlin_permute_bias(bias)
