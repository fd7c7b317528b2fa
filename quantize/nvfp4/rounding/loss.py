"""What a rounding makes small: the error of a product's output, not of its weight."""

from __future__ import annotations

import torch


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
