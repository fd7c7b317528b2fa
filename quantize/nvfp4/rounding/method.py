"""What a rounding method is: a function, and what calibration must know to call it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

Rounded = tuple[torch.Tensor, torch.Tensor]
"""Packed codes, uint8 ``[out, in / 2]``, and block scales, float8_e4m3fn ``[out, in / 16]``."""


class Job(NamedTuple):
    """The arguments of :class:`Round`."""

    weight: torch.Tensor
    hessian: torch.Tensor
    global_scale: torch.Tensor
    output_hessian: torch.Tensor | None = None


class Round(Protocol):
    """``(weight, hessian, global_scale, output_hessian) -> (codes, block_scale)``.

    A method makes ``quantize.nvfp4.rounding.loss.loss`` small. It must leave its arguments as they
    are, and it must accept Hessians that are singular or zero.
    """

    def __call__(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        global_scale: torch.Tensor,
        output_hessian: torch.Tensor | None = None,
    ) -> Rounded:
        """Round one weight.

        Args:
            weight: float32 ``[out, in]``.
            hessian: float32 ``[in, in]``: the second moments ``x x^T`` of the weight's inputs,
                or any positive multiple of them.
            global_scale: float32 scalar.
            output_hessian: float32 ``[out, out]``: the second moments ``g g^T`` of the loss's
                gradients with respect to the weight's outputs, or any positive multiple of them.
                None stands for the identity. Calibration gives it only to methods that
                :attr:`Method.needs_output_hessian`.

        Returns:
            packed codes, uint8 ``[out, in / 2]``, and block scales, float8_e4m3fn
            ``[out, in / 16]``.
        """


class RoundTogether(Protocol):
    """``(jobs, count) -> results``: :class:`Round` of weights that have one shape, on one GPU."""

    def __call__(self, jobs: Iterable[Job], count: int) -> list[Rounded]:
        """Round ``count`` weights. Each of ``jobs`` is dropped before the next one is asked for."""


@dataclass(frozen=True)
class Method:
    """One rounding method.

    The three sizes say how much memory a call takes on the device. Their defaults are what GPTQ
    needs, with which every method here begins.

    Attributes:
        round: the function.
        needs_output_hessian: calibration runs the model backward too, to give ``output_hessian``.
        weight_bytes: for each element of the weight.
        hessian_bytes: for each element of ``hessian``, its factors in float64 included.
        output_hessian_bytes: for each element of ``output_hessian``, if the method needs it.
        together: rounds several weights at once, if that is what it takes to fill a GPU.
        together_bytes: what each weight takes then, for each of its elements. Its Hessians take
            one float32 for each of theirs.
    """

    round: Round
    needs_output_hessian: bool = False
    weight_bytes: int = 24
    hessian_bytes: int = 48
    output_hessian_bytes: int = 24
    together: RoundTogether | None = None
    together_bytes: int = 10
