"""How far second moments of few tokens are trusted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantize.calibration.second_moments import ALIKE, SecondMoments

CPU = torch.device("cpu")


def of(x: torch.Tensor, weights: torch.Tensor | None = None) -> SecondMoments:
    moments = SecondMoments(x.shape[1], CPU)
    for part in range(0, len(x), 100):
        own = None if weights is None else weights[part : part + 100]
        moments.add(x[part : part + 100], own)
    return moments


def shrunk(x: np.ndarray, samples: float) -> np.ndarray:
    """Chen, Wiesel, Eldar and Hero (2010), equation 23, for zero means; trace 1."""
    s = x.T @ x / len(x)
    p = len(s)
    square, trace = np.trace(s @ s), np.trace(s)
    rho = ((1 - 2 / p) * square + trace**2) / ((samples + 1 - 2 / p) * (square - trace**2 / p))
    rho = min(rho, 1.0)
    found = (1 - rho) * s + rho * trace / p * np.eye(p)
    return found / np.trace(found)


@pytest.mark.parametrize("samples", [30, 500, 20000])
def test_equally_large_samples_are_shrunk_as_the_paper_says(samples: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    mix = torch.randn(48, 48, generator=generator)
    x = torch.nn.functional.normalize(torch.randn(samples, 48, generator=generator) @ mix)
    found = of(x).estimate().double().numpy()
    truth = shrunk(x.double().numpy(), samples / ALIKE)
    # sklearn, and so this, leaves out the formula's 2 / p.
    assert np.abs(found / np.trace(found) - truth).max() < 0.06 * truth.max()
    assert of(x).tokens == samples


def test_a_few_large_samples_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(4000, 32, generator=generator))
    x[:2] *= 1000
    found = of(x).estimate()
    off = found - torch.diag(found.diagonal())
    assert off.abs().max() < 1e-6 * found.diagonal().mean()  # two say nothing of directions
    assert torch.allclose(found.diagonal(), found.diagonal().mean().expand(32))


def test_the_routers_weights_count_as_sizes_do() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(300, 16, generator=generator), torch.rand(300, generator=generator)
    found, scaled = of(x, weights), of(x * weights.unsqueeze(1))
    assert torch.allclose(found.estimate(), scaled.estimate(), rtol=1e-4, atol=1e-7)
    assert found.magnitudes.largest == pytest.approx(float(x.abs().max()))  # but not in the range
    assert torch.equal(of(x[:0]).estimate(), torch.zeros(16, 16))
