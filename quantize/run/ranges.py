"""The input scales of experts that a pass over text has found, until their weights are written."""

from __future__ import annotations

import math
from typing import Any

from quantize.experts.group import ExpertGroup
from quantize.run.group_files import GroupFiles


class Ranges(GroupFiles[list[tuple[float, float]]]):
    """The input scales in one folder, as they multiply: for each expert, of gate and up, and of
    down."""

    kind = "ranges"
    key = "input_scales"

    def parse(self, group: ExpertGroup, value: Any) -> list[tuple[float, float]]:
        """See :class:`GroupFiles`."""
        scales = [(float(gate_up), float(down)) for gate_up, down in value]
        if len(scales) != group.num_experts:
            raise ValueError(f"input scales of {len(scales)} experts")
        if not all(math.isfinite(x) and x > 0 for pair in scales for x in pair):
            raise ValueError("an input scale that is not positive")
        return scales
