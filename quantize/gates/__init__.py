"""The gate contract: which activation a checkpoint's experts apply between their two GEMMs.

Written by ``nvfp4-moe quantize`` into ``config.json`` under ``nvfp4_moe``, a key that stock readers
ignore, and obeyed by the vLLM plugin whatever the engine's own layer would do::

    {"nvfp4_moe": {"version": 1, "gate": {"form": "swiglu_oai", "alpha": 1.702, "beta": 1.0,
                                          "limit": 7.0, "interleaved": false}}}

A new form is one file here and one entry in ``FORMS``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from quantize.errors import QuantizeError
from quantize.gates.gelu import Gelu, GeluTanh
from quantize.gates.probe import Probe
from quantize.gates.silu import Silu
from quantize.gates.swiglu_oai import SwigluOai

KEY = "nvfp4_moe"
VERSION = 1


class Form(Protocol):
    """A formula, elementwise on gate and up.

    Attributes:
        numbers: whether alpha, beta and limit mean anything to it.
    """

    numbers: bool

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
    "gelu": Gelu,
    "gelu_tanh": GeluTanh,
}
"""Forms by name; identification takes the first that fits, so special cases come first."""


@dataclass(frozen=True)
class Gate:
    """An activation with its numbers, elementwise on one expert's gate and up outputs.

    Attributes:
        form: a key of ``FORMS``.
        alpha: factor inside the sigmoid.
        beta: added to up.
        limit: clamp of gate (from above) and up (both sides); None for none.
        interleaved: rows are stored gate, up, gate, up; else all of gate, then all of up.
    """

    form: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise QuantizeError(f"unknown gate form {self.form!r}; known: {', '.join(FORMS)}")
        for name in ("alpha", "beta", "limit"):
            value = getattr(self, name)
            if value is None and name == "limit":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise QuantizeError(f"gate {name} must be a number, not {value!r}")
            if not abs(value) < 1e300:  # also refuses NaN, infinity and integers beyond floats
                raise QuantizeError(f"gate {name} must be finite, not {value!r}")
        if not isinstance(self.interleaved, bool):
            raise QuantizeError(f"gate interleaved must be true or false, not {self.interleaved!r}")
        if not FORMS[self.form].numbers and (self.alpha, self.beta, self.limit) != (1, 0, None):
            raise QuantizeError(f"gate form {self.form!r} has no alpha, beta or limit")
        if self.limit is not None and self.limit <= 0:
            raise QuantizeError(f"gate limit must be positive, not {self.limit!r}")

    def __str__(self) -> str:
        numbers = [
            f"{name}={getattr(self, name):g}"
            for name, neutral in (("alpha", 1.0), ("beta", 0.0), ("limit", None))
            if getattr(self, name) != neutral
        ]
        if self.interleaved:
            numbers.append("interleaved")
        return f"{self.form}({', '.join(numbers)})" if numbers else self.form

    def apply(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The formula on separate halves, each ``[..., n]``."""
        return FORMS[self.form].apply(gate, up, self.alpha, self.beta, self.limit)

    def apply_stacked(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The formula on ``[..., 2 * n]`` in this gate's order; ``[..., n]``."""
        if self.interleaved:
            return self.apply(gate_up[..., 0::2], gate_up[..., 1::2])
        return self.apply(*gate_up.chunk(2, dim=-1))

    def concatenated(self) -> Gate:
        """The same gate for tensors that have been split into gate and up."""
        return replace(self, interleaved=False)


def to_contract(gate: Gate) -> dict[str, Any]:
    """The value of ``config.json``'s ``nvfp4_moe`` key."""
    return {"version": VERSION, "gate": asdict(gate)}


def from_contract(value: Any, where: str = "config.json") -> Gate:
    """The gate in a contract.

    Raises:
        QuantizeError: if ``value`` is malformed, or of a version or form this code does not know.
    """
    try:
        if value["version"] != VERSION:
            raise QuantizeError(
                f"{where}: {KEY}.version is {value['version']!r}, this package knows {VERSION}; "
                "update vllm-nvfp4-moe"
            )
        fields = dict(value["gate"])
        return Gate(**fields)
    except QuantizeError as error:
        raise QuantizeError(f"{where}: {KEY}: {error}") from None
    except (TypeError, KeyError, ValueError) as error:
        raise QuantizeError(f"{where}: {KEY} is not a gate contract: {error!r}") from error
