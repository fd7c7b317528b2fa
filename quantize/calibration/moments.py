"""What one product of an expert is given: how much, how large, how correlated."""

from __future__ import annotations

import torch

from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX

HEADROOM = 2.0
"""How much larger than in calibration inputs may be without being clipped. Block scales are E4M3
numbers times the input scale, and their precision is the same over 15 octaves: room costs nothing.
"""

ALIKE = 4
"""Tokens of running text that say as much as one independent sample: neighbours are alike. On
m3-nano with 4,000 tokens an expert, the KL is 0.00609 if all count, 0.00582 if every third does and
0.00593 if every tenth."""


class Moments:
    """Second moments of a product's inputs, weighted with the router's weights; or of the loss's
    gradients by its outputs.

    An expert's output is multiplied by the router's weight ``r`` of the token, so what counts is
    ``|r W x|^2``.

    Attributes:
        total: float32 ``[in, in]``, sum of ``r^2 x x^T``.
        tokens: how many.
        largest: largest magnitude of an input.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.total = torch.zeros(size, size, device=device)
        self.tokens = 0
        self.largest = 0.0
        self._squares = self._fourths = 0.0

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count inputs ``[n, in]`` of tokens with router weights ``[n]``, by default 1."""
        if weights is None:
            weights = torch.ones(len(x), device=x.device)
        if len(x):
            scaled = x.float() * weights.unsqueeze(1)
            self.total += scaled.T @ scaled
            squares = torch.linalg.vector_norm(scaled, dim=1).double().square()
            self._squares += float(squares.sum())
            self._fourths += float(squares.square().sum())
            self.tokens += len(x)
            # Not the built-in max, which would lose a NaN.
            self.largest = float(
                torch.maximum(x.abs().amax().float().cpu(), torch.tensor(self.largest))
            )

    def estimate(self) -> torch.Tensor:
        """A multiple of what the mean of ``r^2 x x^T`` would be over all text, ``[in, in]``.

        Few tokens make directions look empty that are not, and rounding would put its errors there.
        So the mean of those that came is drawn towards a multiple of the identity, by as much as
        their number calls for: oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero, 2010,
        equation 23; ``sklearn.covariance.oas``), with the number of equally large samples that
        these are worth: a few large gradients are few, however many small ones there are.
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


def input_scale(largest: float) -> float:
    """``HEADROOM * largest / (6 * 448)``, ModelOpt's ``input_scale`` with room; 1 for no inputs."""
    return HEADROOM * largest / (E2M1_MAX * E4M3_MAX) if largest > 0 else 1.0
