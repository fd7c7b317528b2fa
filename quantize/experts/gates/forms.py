"""The known forms of gates. A new one is one file here and one line in ``FORMS``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from quantize.registry import Registry

if TYPE_CHECKING:
    import torch

    from quantize.experts.gates.probe import Probe


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


FORMS: Registry[type[Form]] = Registry(
    {
        "silu": "quantize.experts.gates.silu:Silu",
        "swiglu_oai": "quantize.experts.gates.swiglu_oai:SwigluOai",
        "swiglu_step": "quantize.experts.gates.swiglu_step:SwigluStep",
        "situ": "quantize.experts.gates.situ:Situ",
        "gelu": "quantize.experts.gates.gelu:Gelu",
        "gelu_tanh": "quantize.experts.gates.gelu:GeluTanh",
        "relu": "quantize.experts.gates.relu:Relu",
        "relu2": "quantize.experts.gates.relu:Relu2",
    }
)
"""Forms by name. Identification takes the first that fits, so special cases come first."""
