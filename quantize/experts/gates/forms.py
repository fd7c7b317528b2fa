"""The known forms. A new one is one file here and one entry in ``FORMS``."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from quantize.experts.gates.gelu import Gelu, GeluTanh
from quantize.experts.gates.probe import Probe
from quantize.experts.gates.relu import Relu, Relu2
from quantize.experts.gates.silu import Silu
from quantize.experts.gates.swiglu_oai import SwigluOai
from quantize.experts.gates.swiglu_step import SwigluStep


class Form(Protocol):
    """A formula, elementwise on gate and up.

    Attributes:
        gated: whether there is a gate; if not, ``apply`` gets up as both.
        numbers: which of alpha, beta and limit mean anything to it.
    """

    gated: bool
    numbers: tuple[str, ...]

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        """Elementwise result, in the inputs' dtype and shape."""

    @staticmethod
    def recover(probe: Probe) -> dict[str, Any] | None:
        """alpha, beta and limit under which this form could be ``probe``; None if it can't be."""


FORMS: dict[str, type[Form]] = {
    "silu": Silu,
    "swiglu_oai": SwigluOai,
    "swiglu_step": SwigluStep,
    "gelu": Gelu,
    "gelu_tanh": GeluTanh,
    "relu": Relu,
    "relu2": Relu2,
}
"""Forms by name; identification takes the first that fits, so special cases come first."""
