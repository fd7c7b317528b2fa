"""Stands in, on CPUs, for model classes that vLLM cannot even import there.

Without it, the only message about a MiniMax-M3 in its published layout is that its architecture
"failed to be inspected". The class here looks like a text model, so that vLLM's start reaches the
place where this package, or the class itself, can say what to do instead.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_nvfp4_moe import quirks

ARCHITECTURES = ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration")
"""Architectures whose vLLM 0.32 classes import CUDA kernels; published checkpoints name them."""


def refusal(hf_config: Any) -> str | None:
    """Why the model of ``hf_config`` cannot run on a CPU, None if nothing is known against it."""
    found = set(ARCHITECTURES).intersection(getattr(hf_config, "architectures", None) or ())
    if not found:
        return None
    quirks.GPU_ONLY_MODELS.log()
    return (
        f"{found.pop()}, to which the published MiniMax-M3 layout resolves, is a GPU-only model in "
        "vLLM. On a CPU, serve the Transformers layout (architecture MiniMaxM3VLForCausalLM): load "
        "the original with Transformers, save_pretrained() it, and quantize that"
    )


class GpuOnlyModel(torch.nn.Module):
    """Refuses to be built, with the reason."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        raise ValueError(refusal(vllm_config.model_config.hf_config))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("never built")

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("never built")

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("never built")
