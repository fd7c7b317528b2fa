"""One gate: a form with its numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantize.errors import QuantizeError
from quantize.experts.gates.forms import FORMS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gate:
    """An activation with its numbers, elementwise on what one expert's first GEMMs give.

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
        for name, neutral in (("alpha", 1.0), ("beta", 0.0), ("limit", None)):
            if name not in FORMS[self.form].numbers and getattr(self, name) != neutral:
                raise QuantizeError(f"gate form {self.form!r} has no {name}")
        if self.limit is not None and self.limit <= 0:
            raise QuantizeError(f"gate limit must be positive, not {self.limit!r}")
        if self.interleaved and not self.gated:
            raise QuantizeError(f"gate form {self.form!r} has one input: nothing to interleave")

    def __str__(self) -> str:
        numbers = [
            f"{name}={getattr(self, name):g}"
            for name, neutral in (("alpha", 1.0), ("beta", 0.0), ("limit", None))
            if getattr(self, name) != neutral
        ]
        if self.interleaved:
            numbers.append("interleaved")
        return f"{self.form}({', '.join(numbers)})" if numbers else self.form

    @property
    def gated(self) -> bool:
        """Whether there are a gate and an up; False: only up."""
        return FORMS[self.form].gated

    def apply(self, *parts: torch.Tensor) -> torch.Tensor:
        """The formula on (gate, up), each ``[..., n]``; on up alone where there is no gate."""
        return FORMS[self.form].apply(parts[0], parts[-1], self.alpha, self.beta, self.limit)

    def apply_stacked(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The formula on ``[..., 2 * n]`` in this gate's order; ``[..., n]``.

        Without a gate, on up, ``[..., n]``.
        """
        if not self.gated:
            return self.apply(gate_up)
        if self.interleaved:
            return self.apply(gate_up[..., 0::2], gate_up[..., 1::2])
        return self.apply(*gate_up.chunk(2, dim=-1))

    def concatenated(self) -> Gate:
        """The same gate for tensors that have been split into gate and up."""
        return replace(self, interleaved=False)
