"""``relu`` and ``relu2``, without a gate: ``relu(up)`` and its square, as Nemotron-H has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from quantize.experts.gates.probe import Probe


class Relu:
    """No numbers, no gate."""

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
    """As :class:`Relu`, with another formula."""

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        return F.relu(up).square()
