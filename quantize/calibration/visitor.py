"""What a pass through the model shows experts to."""

from __future__ import annotations

from typing import Protocol

from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.routing import Routing
from quantize.experts.group import ExpertGroup


class Visitor(Protocol):
    """A pass shows a visitor each expert with the tokens that the router sends to it."""

    @property
    def behind(self) -> int:
        """How many of the experts that it was shown it is not done with yet."""

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Prepare for the experts of one layer, which come next."""

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        """Look at one expert, and return the weights that the model is to go on with."""

    def end(self) -> None:
        """Finish: all experts of the layer have come."""


class NullVisitor:
    """A visitor that does nothing and changes no weights."""

    @property
    def behind(self) -> int:
        return 0

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        pass

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        return weights

    def end(self) -> None:
        pass
