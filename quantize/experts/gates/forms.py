"""The known forms of gates. To add one, write one file here and add one entry to ``FORMS``."""

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
    """A formula that is applied elementwise to gate and up.

    Attributes:
        gated: whether the formula has a gate. If not, ``apply`` gets up for both arguments.
        numbers: those of ``alpha``, ``beta`` and ``limit`` that the formula uses.
    """

    gated: bool
    numbers: tuple[str, ...]

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        """The elementwise result, with the inputs' dtype and shape."""

    @staticmethod
    def recover(probe: Probe) -> dict[str, Any] | None:
        """The numbers with which this form may equal ``probe``; None if it cannot.

        The caller then compares the two over a grid, so a guess may be wrong.
        """


FORMS: dict[str, type[Form]] = {
    "silu": Silu,
    "swiglu_oai": SwigluOai,
    "swiglu_step": SwigluStep,
    "gelu": Gelu,
    "gelu_tanh": GeluTanh,
    "relu": Relu,
    "relu2": Relu2,
}
"""Forms by name. Identification takes the first that fits, so special cases come first."""
