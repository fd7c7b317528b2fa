"""The interface of a scale rule, which chooses a weight's global scale and its block scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from quantize.nvfp4.format import global_scale_of


def modelopt_global_scale(amax: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """ModelOpt's rule, ``amax / (6 * 448)``: see ``quantize.nvfp4.format.global_scale_of``."""
    return global_scale_of(amax)


class Reach(NamedTuple):
    """Which E4M3 scales a rule tries for a block. Neighbouring positive E4M3 numbers have
    neighbouring bit patterns, and the ``max`` rule's scale has bits ``start``.

    ``start`` comes first. Then come all others from ``start - below`` to
    ``max(start + above, least)``, upwards, as far as they are positive and finite. The scale with
    the least squared error is taken; the first of equals wins.
    """

    below: int = 0
    above: int = 0
    least: int = 0


@dataclass(frozen=True)
class ScaleRule:
    """One rule.

    Attributes:
        block_scale: ``(weight, global_scale) -> block_scale``. It takes a weight, float
            ``[out, in]``, and the global scale, float32 scalar. It returns block scales,
            float8_e4m3fn ``[out, in / 16]``, all positive and finite.
        reach: for a rule that searches as ``mse`` does, the scales that it tries; ``Reach()`` for
            ``max`` itself. The fast kernels implement such rules themselves. None for any other
            rule, which fast kernels leave to the reference kernel.
        global_scale: ``(amax, weights) -> global_scale``. It takes all weights that share the scale
            and their largest magnitude (float32 scalar, finite). It returns a positive float32
            scalar.
        unbiased: afterwards the global scale is multiplied by the number with which the result, in
            the weights' direction, is as long as they are: see
            ``quantize.nvfp4.scales.unbiased``.
    """

    block_scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    reach: Reach | None = None
    global_scale: Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor] = (
        modelopt_global_scale
    )
    unbiased: bool = False
