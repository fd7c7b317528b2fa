"""``swiglu_step``: ``clamp(up, -limit, limit) * min(silu(gate), limit)``.

It clamps after SiLU, while ``swiglu_oai`` clamps before. The last layers of Step-3.7 use it.

Source: ``Step3p7Experts._apply_gate`` in Transformers 5.19.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from quantize.experts.gates.probe import Probe


class SwigluStep:
    """Uses limit; alpha is 1 and beta is 0."""

    gated = True
    numbers: tuple[str, ...] = ("limit",)

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        limit = torch.inf if limit is None else limit
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)

    @staticmethod
    def recover(probe: Probe) -> dict[str, Any] | None:
        limit = probe.limit()
        return {"limit": limit} if limit is not None and limit > 0 else None
