"""What a scale rule is: how it chooses a weight's global scale and its block scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quantize.nvfp4.format import global_scale_of


def modelopt_global_scale(amax: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """ModelOpt's rule, ``amax / (6 * 448)``: see ``quantize.nvfp4.format.global_scale_of``."""
    return global_scale_of(amax)


@dataclass(frozen=True)
class ScaleRule:
    """One rule.

    Attributes:
        block_scale: ``(weight, global_scale) -> block_scale``: float ``[out, in]`` and a float32
            scalar in, float8_e4m3fn ``[out, in / 16]`` out, positive and finite.
        offsets: of a rule that searches: for each block, among the ``max`` rule's scale and its
            E4M3 neighbours, that with the least squared error. These are the neighbours, as
            differences of bit patterns, the first of equals winning; empty for ``max`` itself.
            Every kernel knows such rules. None for any other rule: then kernels that are faster
            than the reference leave the work to it.
        global_scale: ``(amax, weights) -> global_scale``: the largest magnitude of all weights that
            share the scale (float32 scalar, finite) and these weights in, a positive float32
            scalar out.
    """

    block_scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    offsets: tuple[int, ...] | None = None
    global_scale: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor] = (
        modelopt_global_scale
    )
