"""Stands in, on CPUs, for model classes that vLLM cannot even import there.

Without it, the only message about a MiniMax-M3 in its published layout is that its architecture
"failed to be inspected". The class looks like a text model, so that start-up reaches the place
where this package, or the class itself, can say what to do instead.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_nvfp4_moe import compat


class GpuOnlyModel(torch.nn.Module):
    """Refuses to be built, with the reason."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        raise ValueError(compat.gpu_only_model(vllm_config.model_config.hf_config))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("never built")

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("never built")

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("never built")
