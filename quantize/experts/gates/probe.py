"""Reading a gate's numbers off its outputs: the gate is a black box that takes gate and up."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

FAR = 1e4
"""A value beyond every clamp that a model would use, and at which a sigmoid is 1."""


class Probe:
    """A gating function ``f(gate, up)``, elementwise on float64 tensors.

    Every known gate is ``(clamp(up) + beta) * h(clamp(gate))``. It is linear in up within the
    clamp, so three evaluations give beta, the clamp of up, and h.

    Attributes:
        function: the function.
        gated: whether it depends on gate. If False, it depends on up alone and ignores gate.
    """

    def __init__(
        self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], gated: bool = True
    ) -> None:
        self.function = function
        self.gated = gated

    def __call__(self, gate: float, up: float) -> float:
        as_tensor = [torch.tensor([v], dtype=torch.float64) for v in (gate, up)]
        return float(self.function(as_tensor[0], as_tensor[1])[0])

    def h(self, gate: float) -> float:
        """The factor that depends on gate alone."""
        return self(gate, 1.0) - self(gate, 0.0)

    def beta(self) -> float:
        """The number that is added to up."""
        return _neat(self(1.0, 0.0) / self.h(1.0))

    def limit(self) -> float | None:
        """The value at which up is clamped; None if it is not clamped."""
        reached = self(1.0, FAR) / self.h(1.0) - self.beta()
        return None if reached > 0.99 * FAR else _neat(reached)


def _neat(value: float) -> float:
    """``value`` without the rounding errors of float64 arithmetic: 1.702, not 1.7020000000001."""
    rounded = float(f"{value:.9g}")
    return rounded if math.isclose(rounded, value, rel_tol=1e-8, abs_tol=1e-9) else value


def logit(p: float) -> float:
    """Inverse of the sigmoid."""
    return _neat(math.log(p / (1 - p)))
