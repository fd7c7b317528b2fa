"""From the largest inputs of a layer's experts to their input scales."""

from __future__ import annotations

import math

from quantize.calibration.damaged import OF_TEXT, damaged
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.routing import Routing
from quantize.calibration.visitor import NullVisitor
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import ExpertGroup
from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX
from quantize.run.options import MIN_TOKENS
from quantize.run.ranges import Ranges

HEADROOM = 2.0
"""Inputs may be so many times as large as in calibration before they are clipped. Block scales are
E4M3 numbers times the input scale, and E4M3 is equally precise over 15 octaves, so this room costs
nothing."""


def input_scale(largest: float) -> float:
    """Return ModelOpt's ``input_scale`` with room, ``HEADROOM * largest / (6 * 448)``.

    Args:
        largest: the largest magnitude of an input; 0 if there were no inputs, and then the result
            is 1.
    """
    return HEADROOM * largest / (E2M1_MAX * E4M3_MAX) if largest > 0 else 1.0


def input_scales(
    largest: list[tuple[float, float]], undersampled: set[int]
) -> list[tuple[float, float]]:
    """Return the input scales of a layer's experts: of gate and up, and of down.

    Args:
        largest: for each expert, the largest magnitudes of these inputs.
        undersampled: experts with fewer than ``MIN_TOKENS`` tokens; they get the layer's.
    """
    layer = tuple(max(column) for column in zip(*largest, strict=True))
    pairs = (layer if expert in undersampled else own for expert, own in enumerate(largest))
    return [(input_scale(gate_up), input_scale(down)) for gate_up, down in pairs]


class RangeGatherer(NullVisitor):
    """A visitor (``quantize.calibration.visitor``) that finds the input scales of experts.

    Args:
        groups: the experts whose input scales are wanted; it lets others pass.
        every_expert: each expert is given all tokens, not only those routed to it.
    """

    def __init__(
        self, checkpoint: Checkpoint, ranges: Ranges, groups: list[ExpertGroup], every_expert: bool
    ) -> None:
        self._checkpoint = checkpoint
        self._ranges = ranges
        self._groups = groups
        self._every_expert = every_expert

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Prepare for the group's experts."""
        self._group = group if group in self._groups else None
        self._largest: list[tuple[float, float]] = []
        self._undersampled: set[int] = set()

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        """Look at the inputs of one expert's two products.

        Raises:
            DamagedWeightsError: if they are NaN or infinite.
        """
        if self._group is None:
            return weights
        tokens, inputs, intermediates = 0, 0.0, 0.0
        for chunk in routing.all() if self._every_expert else routing.of(number):
            found = [float(x.abs().amax()) for x in (chunk.x, weights.intermediate(chunk.x))]
            if not all(map(math.isfinite, found)):
                raise damaged(self._checkpoint, self._group, number, OF_TEXT)
            tokens += len(chunk.x)
            inputs, intermediates = max(inputs, found[0]), max(intermediates, found[1])
        self._largest.append((inputs, intermediates))
        if tokens < MIN_TOKENS:
            self._undersampled.add(number)
        return weights

    def end(self) -> None:
        """Keep the layer's input scales."""
        if self._group is not None:
            scales = input_scales(self._largest, self._undersampled)
            self._ranges.write(self._group, scales)
