"""One gate: a form with its numbers alpha, beta and limit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from quantize.errors import QuantizeError
from quantize.experts.gates.forms import FORMS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gate:
    """An activation with its numbers, elementwise on the outputs of an expert's first GEMMs.

    Attributes:
        form: a key of ``FORMS``.
        alpha: the factor inside the sigmoid; for ``situ``, the gate's cap.
        beta: the number that is added to up.
        limit: the clamp, ``(-inf, limit]`` for gate and ``[-limit, limit]`` for up; for ``situ``,
            up's cap; None for none.
        interleaved: whether rows are stored as gate, up, gate, up, ...; if not, all rows of gate
            come before all rows of up.
        post_norm: whether each expert's output goes through a norm, before the router's weight
            (Muse Spark). The norm has weights of its own, so it is not part of :meth:`apply`.

    Raises:
        QuantizeError: if the form is unknown, if a number is not finite, if the form does not use
            a number that is set, or if alpha or limit is not positive.
    """

    form: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    interleaved: bool = False
    post_norm: bool = False

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
        for name in ("interleaved", "post_norm"):
            if not isinstance(value := getattr(self, name), bool):
                raise QuantizeError(f"gate {name} must be true or false, not {value!r}")
        for name, neutral in (("alpha", 1.0), ("beta", 0.0), ("limit", None)):
            if name not in FORMS[self.form].numbers and getattr(self, name) != neutral:
                raise QuantizeError(f"gate form {self.form!r} has no {name}")
        if self.limit is not None and self.limit <= 0:
            raise QuantizeError(f"gate limit must be positive, not {self.limit!r}")
        if self.form == "situ" and self.alpha <= 0:  # it is divided by
            raise QuantizeError(f"gate alpha must be positive, not {self.alpha!r}")
        if self.interleaved and not self.gated:
            raise QuantizeError(f"gate form {self.form!r} has one input: nothing to interleave")

    def __str__(self) -> str:
        numbers = [
            f"{name}={getattr(self, name):g}"
            for name, neutral in (("alpha", 1.0), ("beta", 0.0), ("limit", None))
            if getattr(self, name) != neutral
        ]
        numbers += [name for name in ("interleaved", "post_norm") if getattr(self, name)]
        return f"{self.form}({', '.join(numbers)})" if numbers else self.form

    @property
    def gated(self) -> bool:
        """Whether there are gate and up; if False, there is only up."""
        return FORMS[self.form].gated

    def fields(self) -> dict[str, Any]:
        """What the contract says of it. ``post_norm`` is there only if it is true: readers of
        contracts before version 3 do not know it."""
        found = asdict(self)
        if not self.post_norm:
            del found["post_norm"]
        return found

    def apply(self, *parts: torch.Tensor) -> torch.Tensor:
        """Apply the formula to gate and up, each ``[..., n]``; to up alone if there is no gate."""
        return FORMS[self.form].apply(parts[0], parts[-1], self.alpha, self.beta, self.limit)

    def apply_stacked(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Apply the formula to one tensor that holds gate and up; returns ``[..., n]``.

        Args:
            gate_up: ``[..., 2 * n]``, interleaved if this gate is; without a gate, up ``[..., n]``.
        """
        if not self.gated:
            return self.apply(gate_up)
        if self.interleaved:
            return self.apply(gate_up[..., 0::2], gate_up[..., 1::2])
        return self.apply(*gate_up.chunk(2, dim=-1))

    def concatenated(self) -> Gate:
        """The same gate for tensors that hold all of gate, then all of up (not interleaved)."""
        return replace(self, interleaved=False)
