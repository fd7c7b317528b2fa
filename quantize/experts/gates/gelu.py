"""``gelu`` and ``gelu_tanh``: ``up * gelu(gate)``, exact or with the tanh approximation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from quantize.experts.gates.probe import Probe


class Gelu:
    """No numbers."""

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
    """As :class:`Gelu`, with another formula."""

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        return F.gelu(gate, approximate="tanh") * up
