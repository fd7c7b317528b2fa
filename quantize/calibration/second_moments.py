"""Second moments of a product's inputs or of its gradients: what rounding takes as Hessians."""

from __future__ import annotations

import torch

from quantize.nvfp4.input_scales.magnitudes import Magnitudes

ALIKE = 4
"""So many tokens of running text say as much as one independent sample, because neighbours are
alike. On m3-nano with 4,000 tokens an expert, the KL divergence is 0.00609 if every token counts,
0.00582 if every third counts and 0.00593 if every tenth counts."""


class SecondMoments:
    """Second moments of a product's inputs, or of the loss's gradients with respect to its outputs.

    An expert's output is multiplied by the router's weight ``r`` of the token. So the error that
    counts is ``|r D x|^2``, where ``D`` is a weight's error, and its Hessian is the sum of
    ``r^2 x x^T``: GPTQ's ``H = X X^T`` (arXiv 2210.17323) of weighted inputs.

    Attributes:
        total: float32 ``[in, in]``, the sum of ``r^2 x x^T``.
        tokens: how many tokens were added.
        magnitudes: of the elements of ``x``.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.total = torch.zeros(size, size, device=device)
        self.tokens = 0
        self.magnitudes = Magnitudes()
        self._squares = self._fourths = 0.0

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add inputs ``[n, in]`` of tokens with router weights ``[n]``, by default 1."""
        if weights is None:
            weights = torch.ones(len(x), device=x.device)
        if len(x):
            scaled = x.float() * weights.unsqueeze(1)
            self.total += scaled.T @ scaled
            squares = torch.linalg.vector_norm(scaled, dim=1).double().square()
            self._squares += float(squares.sum())
            self._fourths += float(squares.square().sum())
            self.tokens += len(x)
            self.magnitudes.add(x)

    def estimate(self) -> torch.Tensor:
        """Estimate a multiple of the mean of ``r^2 x x^T`` over all text, float32 ``[in, in]``.

        A few tokens make directions look empty that are not, and rounding would put its errors
        there. So this draws the mean over the tokens that came towards a multiple of the identity.
        How far depends on their number: it is oracle approximating shrinkage (Chen, Wiesel, Eldar
        and Hero, 2010, equation 23; ``sklearn.covariance.oas``). The number of samples in that
        formula is here the number of equally large samples that say as much as these do: a few
        large gradients are few, however many small ones come with them.
        """
        if not self.tokens or self._squares <= 0:
            return self.total
        size = len(self.total)
        mean = self.total / self._squares
        worth = self._squares**2 / self._fourths / ALIKE
        trace = float(mean.diagonal().sum(dtype=torch.float64))
        average = trace / size
        spread = float(mean.square().mean(dtype=torch.float64))
        above = spread + average**2
        below = (worth + 1) * (spread - average**2 / size)
        share = 1.0 if below <= 0 else min(1.0, above / below)
        shrunk = (1 - share) * mean
        shrunk.diagonal().add_(share * average)
        return shrunk
