"""``silu``: ``up * gate * sigmoid(gate)``, the SwiGLU of Qwen, Mixtral, DeepSeek and others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from quantize.experts.gates.probe import Probe


class Silu:
    """Uses no numbers: alpha is 1, beta is 0, and there is no limit."""

    gated = True
    numbers: tuple[str, ...] = ()

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        return F.silu(gate) * up

    @staticmethod
    def recover(probe: Probe) -> dict[str, Any] | None:
        return {}
