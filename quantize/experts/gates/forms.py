"""The known forms. A new one is one file here and one line in ``FORMS``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from quantize.registry import Registry

if TYPE_CHECKING:
    import torch

    from quantize.experts.gates.probe import Probe


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


FORMS: Registry[type[Form]] = Registry(
    {
        "silu": "quantize.experts.gates.silu:Silu",
        "swiglu_oai": "quantize.experts.gates.swiglu_oai:SwigluOai",
        "swiglu_step": "quantize.experts.gates.swiglu_step:SwigluStep",
        "gelu": "quantize.experts.gates.gelu:Gelu",
        "gelu_tanh": "quantize.experts.gates.gelu:GeluTanh",
        "relu": "quantize.experts.gates.relu:Relu",
        "relu2": "quantize.experts.gates.relu:Relu2",
    }
)
"""Forms by name; identification takes the first that fits, so special cases come first."""
