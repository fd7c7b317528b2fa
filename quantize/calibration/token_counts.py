"""Which experts get too little of the text: said as soon as a layer's router has spoken."""

from __future__ import annotations

from collections.abc import Iterable

from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.proof import Say
from quantize.calibration.routing import Routing
from quantize.calibration.visitor import NullVisitor, Visitor
from quantize.experts.group import ExpertGroup
from quantize.run.options import MIN_TOKENS


class TokenCounts:
    """A visitor that counts the tokens of experts.

    Args:
        groups: the experts that are to be calibrated; others are not counted.
        say: is told of each layer with experts that get fewer than ``MIN_TOKENS`` tokens.
    """

    def __init__(self, groups: list[ExpertGroup], say: Say) -> None:
        self._groups, self._say = groups, say
        self._then: Visitor = NullVisitor()
        self._least: list[int] = []
        self._few = 0

    def before(self, visitor: Visitor) -> TokenCounts:
        """Show all to ``visitor`` too."""
        self._then = visitor
        return self

    @property
    def behind(self) -> int:
        """Of the other visitor."""
        return self._then.behind

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Count the tokens of the group's experts."""
        if group in self._groups:
            counts = routing.counts.tolist()
            few = [group.first + n for n, count in enumerate(counts) if count < MIN_TOKENS]
            self._least += counts
            self._few += len(few)
            if few:
                self._say(
                    f"Warning: {group.prefix}: {len(few)} of {len(counts)} experts get fewer than "
                    f"{MIN_TOKENS} of {len(routing.x)} tokens: {ranges(few)}"
                )
        self._then.begin(layer, group, routing)

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        """Show an expert to the other visitor."""
        return self._then.expert(number, weights, routing)

    def end(self) -> None:
        """End the other visitor's layer."""
        self._then.end()

    def sum_up(self) -> None:
        """Say how it is with all experts that have come."""
        if self._few:
            self._say(
                f"Warning: {self._few} of {len(self._least)} experts get too little text to be "
                "calibrated: they are rounded to nearest, with their layer's input scales. Give "
                "more text, or text of other kinds"
            )
        elif self._least:
            self._say(
                f"Each of {len(self._least)} experts gets at least {min(self._least)} tokens of "
                "text"
            )


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as ``1, 4-6``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)
