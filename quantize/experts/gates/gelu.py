"""``gelu`` and ``gelu_tanh``: ``up * gelu(gate)``, exact or with tanh's approximation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from quantize.experts.gates.probe import Probe


class Gelu:
    """``up * gelu(gate)``; uses no numbers."""

    gated = True
    numbers: tuple[str, ...] = ()

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        return F.gelu(gate) * up

    @staticmethod
    def recover(probe: Probe) -> dict[str, Any] | None:
        return {}


class GeluTanh(Gelu):
    """``up * gelu(gate)`` with tanh's approximation; uses no numbers."""

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        return F.gelu(gate, approximate="tanh") * up
