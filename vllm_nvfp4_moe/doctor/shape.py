"""The sizes of a layer of experts, and the least time that such a layer can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from quantize.experts.gates import Gate

BYTES = 4.5 / 8
"""Of a weight."""

SILU = Gate("silu")


@dataclass(frozen=True)
class Shape:
    """A layer's sizes on one rank of ``tp``; ``top_k`` experts a token, which may have biases.

    Attributes:
        router: how experts are scored: ``softmax``; or ``sigmoid``, with a correction bias for the
            choice alone.
    """

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    gate: Gate = SILU
    tp: int = 1
    biased: bool = False
    router: str = "softmax"

    def divides(self, tp: int) -> bool:
        """Whether the slices of so many ranks are whole blocks of 16."""
        return self.intermediate % (16 * tp) == 0

    def slice(self, tp: int) -> Shape:
        """One rank's."""
        return replace(self, intermediate=self.intermediate // tp, tp=tp)

    @property
    def weights(self) -> int:
        """Of one expert."""
        return self.matrices * self.hidden * self.intermediate

    @property
    def matrices(self) -> int:
        """Of one expert: gate, if there is one, up and down."""
        return 3 if self.gate.gated else 2


def restored(sizes: Mapping[str, Any]) -> Shape:
    """A shape from what ``dataclasses.asdict`` made of it."""
    return Shape(**{**sizes, "gate": Gate(**sizes["gate"])})


CLAMPED = Gate("swiglu_oai", 1.702, 1.0, 7.0)
MINIMAX_M3 = Shape("minimax-m3", 128, 6144, 3072, 4, CLAMPED)


class Floor(NamedTuple):
    """Milliseconds that reading the weights and that computing take at least."""

    memory: float
    flops: float

    @property
    def ms(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.flops else "FLOPs"


def floor(shape: Shape, tokens: int, active: float, bandwidth: float, flops: float) -> Floor:
    """Of one call.

    Args:
        active: experts that any token goes to.
        bandwidth: TB/s.
        flops: TFLOP/s.
    """
    read = active * shape.weights * BYTES
    computed = 2 * tokens * shape.top_k * shape.weights
    return Floor(read / bandwidth / 1e9, computed / flops / 1e9)


def active_experts(ids: torch.Tensor) -> int:
    """How many experts int32 ``[tokens, k]`` names; negative ones are nobody's."""
    return int(ids[ids >= 0].unique().numel())


def title(shape: Shape) -> str:
    """Its sizes in words."""
    return (
        f"{shape.name}, tensor parallel {shape.tp}: {shape.experts} experts, "
        f"{shape.hidden} x {shape.intermediate}, top {shape.top_k}, {shape.gate}"
        + (", biases" if shape.biased else "")
    )
