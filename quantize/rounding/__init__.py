"""Choosing codes by what a weight's inputs are: the error of its output, not of the weight.

A method is a function ``(weight, moment, global_scale) -> (codes, block_scale)``. In: float32
``[out, in]``, the inputs' second moments ``[in, in]`` (any positive multiple of them), a float32
scalar. Out: bytes uint8 ``[out, in / 2]`` and float8_e4m3fn ``[out, in / 16]``. What it makes small
is :func:`loss`. A new one is one file here and one line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantize.rounding.descent import descent
from quantize.rounding.gptq import gptq

Method = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

METHODS: dict[str, Method] = {"gptq": gptq, "descent": descent}


def loss(difference: torch.Tensor, moment: torch.Tensor) -> float:
    """``trace(D M D^T)`` for ``D`` ``[out, in]`` and moments ``M`` ``[in, in]``.

    With ``M`` the mean of ``x x^T`` over inputs ``x``, this is the mean of ``|D x|^2``.
    """
    return float(((difference @ moment) * difference).sum(dtype=torch.float64))
