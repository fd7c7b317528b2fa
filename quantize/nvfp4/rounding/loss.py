"""What a rounding method makes small: the error of a product's output, not of its weight."""

from __future__ import annotations

import torch


def loss(
    difference: torch.Tensor, hessian: torch.Tensor, output_hessian: torch.Tensor | None = None
) -> float:
    """Return ``trace(G D H D^T)``.

    ``D`` ``[out, in]`` is the ``difference`` of two weights, ``H`` ``[in, in]`` the Hessian of the
    inputs and ``G`` ``[out, out]`` the Hessian of the outputs; without one, ``G`` is the identity.

    With ``H`` the mean of ``x x^T`` over inputs ``x`` and ``G`` the identity, this is the mean of
    ``|D x|^2``. With ``G`` the mean of ``g g^T`` over gradients ``g`` that do not depend on the
    inputs, it is the mean of ``(g . D x)^2``.
    """
    product = difference @ hessian
    if output_hessian is not None:
        product = output_hessian @ product
    return float((product * difference).sum(dtype=torch.float64))
