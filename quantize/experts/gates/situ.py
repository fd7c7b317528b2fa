"""``situ``: ``alpha * tanh(gate / alpha) * sigmoid(gate) * limit * tanh(up / limit)``.

It is SwiGLU whose linear factors are capped smoothly: the gate's at ``alpha``, and up at ``limit``
if there is one. Kimi-K3 and Inkling 2 have 4 and 25.

Source: ``SituAndMul`` in vLLM 0.32, whose ``beta`` is alpha here and whose ``linear_beta`` is
limit; and ``Inkling2SoftcappedSwiGLU`` in Transformers 5.24 (``mlp_gate_softcap``,
``mlp_up_softcap``). Both compute in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from quantize.experts.gates.probe import FAR, Probe


class Situ:
    """Uses alpha and limit; beta is 0."""

    gated = True
    numbers: tuple[str, ...] = ("alpha", "limit")

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        if limit is not None:
            up = limit * torch.tanh(up / limit)
        return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * up

    @staticmethod
    def recover(probe: Probe) -> dict[str, Any] | None:
        far = probe(1.0, FAR)
        if not far > 0:
            return None
        # At FAR, tanh and the sigmoid are 1. Without a limit, the ratio is 1 / FAR.
        ratio = probe(1.0, 1.0) / far
        if not 2 / FAR < ratio < 0.999:
            limit, up = None, 1.0
        else:
            limit = _float32(1 / math.atanh(ratio))
            up = limit * math.tanh(1 / limit)
        alpha = _float32(probe(FAR, 1.0) / up)
        return {"alpha": alpha, "limit": limit} if 0 < alpha < FAR / 10 else None


def _float32(value: float) -> float:
    """``value`` without the rounding errors of float32 arithmetic: 25, not 25.0000019."""
    rounded = float(f"{value:.5g}")
    return rounded if math.isclose(rounded, value, rel_tol=1e-6) else value
