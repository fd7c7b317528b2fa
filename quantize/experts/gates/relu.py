"""``relu`` and ``relu2``, which have no gate: ``relu(up)``, and its square (Nemotron-H)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from quantize.experts.gates.probe import Probe


class Relu:
    """``relu(up)``; has no gate and uses no numbers."""

    gated = False
    numbers: tuple[str, ...] = ()

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        return F.relu(up)

    @staticmethod
    def recover(probe: Probe) -> dict[str, Any] | None:
        return {}


class Relu2(Relu):
    """``relu(up) ** 2``; has no gate and uses no numbers."""

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        return F.relu(up).square()
