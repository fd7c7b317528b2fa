"""``swiglu_oai``: ``(clamp(up, -limit, limit) + beta) * g * sigmoid(alpha * g)``.

Here ``g`` is ``min(gate, limit)``. GPT-OSS and MiniMax-M3 have alpha 1.702, beta 1 and limit 7.
With alpha 1 and beta 0 it is SiLU with a clamp.

Source: ``GptOssExperts._apply_gate`` and ``MiniMaxM3VLExperts._apply_gate`` in Transformers 5.19.
"""

from __future__ import annotations

from typing import Any

import torch

from quantize.experts.gates.probe import Probe, logit


class SwigluOai:
    """Uses alpha, beta and limit."""

    gated = True
    numbers: tuple[str, ...] = ("alpha", "beta", "limit")

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + beta) * (gate * torch.sigmoid(alpha * gate))

    @staticmethod
    def recover(probe: Probe) -> dict[str, Any] | None:
        slope = probe.h(1.0)
        if not 0.5 < slope < 1:  # sigmoid(alpha) for a positive alpha
            return None
        return {"alpha": logit(slope), "beta": probe.beta(), "limit": probe.limit()}
