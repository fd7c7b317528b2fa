"""What a rounding method is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Round(Protocol):
    """``(weight, moment, global_scale, output) -> (codes, block_scale)``.

    In: float32 ``[out, in]``; the inputs' second moments ``[in, in]``, any positive multiple of
    them; a float32 scalar; the second moments ``[out, out]`` of the loss's gradient by the outputs,
    any positive multiple, or None. Out: bytes uint8 ``[out, in / 2]`` and float8_e4m3fn
    ``[out, in / 16]``. What it makes small is ``quantize.nvfp4.rounding.loss.loss``.
    """

    def __call__(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        global_scale: torch.Tensor,
        output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class Method:
    """One way to round.

    Attributes:
        needs_output: it takes every output to be as important as every other unless it is given
            ``output``, so calibration runs the model backward for it.
    """

    round: Round
    needs_output: bool = False
