"""From what a layer's experts are given to their input scales."""

from __future__ import annotations

import math
from collections.abc import Callable

from quantize.calibration.damaged import OF_TEXT, damaged
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.routing import Routing
from quantize.calibration.visitor import NullVisitor
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import ExpertGroup
from quantize.nvfp4.input_scales import INPUT_RULES
from quantize.nvfp4.input_scales.magnitudes import Magnitudes
from quantize.run.options import MIN_TOKENS, Calibration
from quantize.run.ranges import Ranges


def input_scales(
    magnitudes: list[tuple[Magnitudes, Magnitudes]],
    undersampled: set[int],
    rule: Callable[[Magnitudes], float],
) -> list[tuple[float, float]]:
    """Return the input scales of a layer's experts: of gate and up, and of down.

    Args:
        magnitudes: for each expert, those of these inputs.
        undersampled: experts with fewer than ``MIN_TOKENS`` tokens; they get the layer's.
        rule: one of ``quantize.nvfp4.input_scales.INPUT_RULES``.
    """
    layer = tuple(map(Magnitudes.of_all, zip(*magnitudes, strict=True)))
    pairs = (layer if expert in undersampled else own for expert, own in enumerate(magnitudes))
    return [(rule(gate_up), rule(down)) for gate_up, down in pairs]


class RangeGatherer(NullVisitor):
    """A visitor (``quantize.calibration.visitor``) that finds the input scales of experts.

    Args:
        groups: the experts whose input scales are wanted; it lets others pass.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ranges: Ranges,
        groups: list[ExpertGroup],
        settings: Calibration,
    ) -> None:
        self._checkpoint = checkpoint
        self._ranges = ranges
        self._groups = groups
        self._settings = settings

    def begin(self, layer: int, group: ExpertGroup, routing: Routing) -> None:
        """Prepare for the group's experts."""
        self._group = group if group in self._groups else None
        self._magnitudes: list[tuple[Magnitudes, Magnitudes]] = []
        self._undersampled: set[int] = set()

    def expert(self, number: int, weights: ExpertWeights, routing: Routing) -> ExpertWeights:
        """Look at the inputs of one expert's two products.

        Raises:
            DamagedWeightsError: if they are NaN or infinite.
        """
        if self._group is None:
            return weights
        tokens, inputs, intermediates = 0, Magnitudes(), Magnitudes()
        for chunk in routing.all() if self._settings.every_expert else routing.of(number):
            inputs.add(chunk.x)
            intermediates.add(weights.intermediate(chunk.x))
            if not (math.isfinite(inputs.largest) and math.isfinite(intermediates.largest)):
                raise damaged(self._checkpoint, self._group, number, OF_TEXT)
            tokens += len(chunk.x)
        self._magnitudes.append((inputs, intermediates))
        if tokens < MIN_TOKENS:
            self._undersampled.add(number)
        return weights

    def end(self) -> None:
        """Keep the layer's input scales."""
        if self._group is not None:
            rule = INPUT_RULES[self._settings.input_scale_rule]
            scales = input_scales(self._magnitudes, self._undersampled, rule)
            self._ranges.write(self._group, scales)
