"""Choosing codes by what a weight's inputs are: the error of its output, not of the weight.

A method is a function ``(weight, moment, global_scale, output) -> (codes, block_scale)``. In:
float32 ``[out, in]``, the inputs' second moments ``[in, in]`` (any positive multiple of them), a
float32 scalar, and the second moments ``[out, out]`` of the loss's gradient by the outputs (also
any positive multiple, or None), which only those in ``NEEDS_OUTPUT`` look at. Out: bytes uint8
``[out, in / 2]`` and float8_e4m3fn ``[out, in / 16]``. What it makes small is :func:`loss`. A new
one is one file here and one line in ``METHODS``.
"""

from __future__ import annotations

from typing import Protocol

import torch

from quantize.rounding.descent import descent
from quantize.rounding.gptq import gptq
from quantize.rounding.two_sided import two_sided


class Method(Protocol):
    """See the module's docstring."""

    def __call__(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        global_scale: torch.Tensor,
        output: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


METHODS: dict[str, Method] = {"gptq": gptq, "descent": descent, "two-sided": two_sided}

NEEDS_OUTPUT = frozenset({"two-sided"})
"""Methods that take every output to be as important as every other if they get no ``output``."""


def loss(
    difference: torch.Tensor, moment: torch.Tensor, output: torch.Tensor | None = None
) -> float:
    """``trace(G D M D^T)`` for ``D`` ``[out, in]``, moments ``M`` ``[in, in]`` and ``G``
    ``[out, out]``.

    With ``M`` the mean of ``x x^T`` over inputs ``x`` and no ``G`` (the identity), this is the mean
    of ``|D x|^2``. With ``G`` the mean of ``g g^T`` over gradients ``g`` that do not depend on the
    inputs, it is the mean of ``(g . D x)^2``.
    """
    product = difference @ moment
    if output is not None:
        product = output @ product
    return float((product * difference).sum(dtype=torch.float64))
