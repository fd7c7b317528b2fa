"""Input scale rules, beside ModelOpt's own code and plain floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantize.nvfp4.activations import round_nvfp4
from quantize.nvfp4.input_scales import INPUT_RULES
from quantize.nvfp4.input_scales.magnitudes import Magnitudes

BIN = 1.13
"""Percentiles are of bins, ours and ModelOpt's: so far they may be from each other."""


def spread(sigma: float, count: int = 20000, outliers: tuple[float, ...] = ()) -> torch.Tensor:
    """Magnitudes of blocks whose logarithms are a Gaussian of this width, float32 ``[n]``."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = torch.exp(sigma * torch.special.ndtri(places))
    return torch.cat([found, torch.tensor(outliers, dtype=torch.float64)]).float()


def inputs(magnitudes: torch.Tensor) -> torch.Tensor:
    """``[n / 10, 160]`` with blocks of these largest magnitudes."""
    x = torch.zeros(len(magnitudes), 16)
    x[:, 3], x[:, 5] = -magnitudes, magnitudes / 3
    return x.view(-1, 160)


def seen(*batches: torch.Tensor) -> Magnitudes:
    found = Magnitudes()
    for batch in batches:
        found.add(batch)
    return found


MODELOPT = {
    "narrow": (spread(0.5), 1.954849606468564),
    "wide": (spread(2.0), 0.5565401258922759),
    "wider than E4M3": (spread(4.0), 878.9014136904761),
    "ten outliers": (spread(1.0, 19990, (1e6,) * 10), 369.53252883184524),
    "one outlier": (spread(1.0, 19999, (1e6,)), 0.5939064480009533),
    "half zeros": (torch.cat([spread(1.0, 10000), torch.zeros(10000)]), 0.5939064480009533),
    "half of nothing": (
        torch.cat([spread(1.0, 10000), 1e-9 * spread(1.0, 10000)]),
        0.5939064480009533,
    ),
}
"""Magnitudes, and what nvidia-modelopt 0.47.0's ``NVFP4ActHeadroomCalibrator`` made of
:func:`inputs` of them: ``collect(x)``, then ``compute_amax() / (6 * 448)``."""


@pytest.mark.parametrize("name", MODELOPT)
def test_headroom_is_modelopts(name: str) -> None:
    magnitudes, theirs = MODELOPT[name]
    ours = INPUT_RULES["headroom"](seen(inputs(magnitudes)))
    assert theirs / BIN < ours < theirs * BIN


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.5, 5.0])
def test_headroom_is_its_formula(sigma: float) -> None:
    """In float64, with percentiles of the numbers themselves."""
    random = np.random.default_rng(0)
    magnitudes = np.exp(random.normal(0, sigma, 30000))
    upper = np.percentile(magnitudes, 99.99, method="inverted_cdf")
    anchor = np.percentile(magnitudes[magnitudes > upper / 1e6], 1, method="inverted_cdf")
    want = max(16384 * anchor, upper) / (6 * 448)
    ours = INPUT_RULES["headroom"](seen(inputs(torch.from_numpy(magnitudes).float())))
    assert want / BIN < ours < want * BIN


def test_max_is_twice_the_largest_of_all_batches() -> None:
    first, second = inputs(spread(1.0)), 3 * inputs(spread(0.5))
    want = 2 * float(torch.cat([first, second]).abs().max()) / (6 * 448)
    for batches in ((first, second), (second, first)):
        assert INPUT_RULES["max"](seen(*batches)) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("rule", INPUT_RULES)
def test_no_inputs_and_zeros_have_the_neutral_scale(rule: str) -> None:
    for none in (seen(), seen(torch.zeros(0, 32)), seen(torch.zeros(4, 32))):
        assert INPUT_RULES[rule](none) == 1.0


@pytest.mark.parametrize("rule", INPUT_RULES)
def test_batches_and_experts_add_up(rule: str) -> None:
    x = inputs(spread(2.0)).bfloat16()
    parts = x.split(700)
    together = INPUT_RULES[rule](seen(x))
    assert INPUT_RULES[rule](seen(*parts)) == together
    assert INPUT_RULES[rule](Magnitudes.of_all(map(seen, parts))) == together
    # A last block that is shorter is padded, which changes no magnitude.
    assert INPUT_RULES[rule](seen(x[:, :152])) == pytest.approx(together, rel=0.2)


def test_a_damaged_input_is_not_lost() -> None:
    for bad in (math.nan, -math.nan, math.inf):
        x = torch.ones(3, 64)
        x[1, 17] = bad
        assert not math.isfinite(seen(torch.ones(3, 64), x, torch.ones(3, 64)).largest)


def lost(x: torch.Tensor, input_scale: float) -> float:
    return float((round_nvfp4(x, torch.tensor(input_scale)) - x).norm() / x.norm())


def test_what_headroom_is_for() -> None:
    """Inputs that grow a hundredfold after calibration: ``max`` has room for two."""
    torch.manual_seed(0)
    x = torch.randn(64, 512)
    scales = {name: rule(seen(x)) for name, rule in INPUT_RULES.items()}
    for scale in scales.values():  # on what was seen, both lose what a Gaussian's blocks lose
        assert lost(x, scale) == pytest.approx(0.095, abs=0.003)
    assert lost(100 * x, scales["headroom"]) == pytest.approx(0.095, abs=0.003)
    assert lost(100 * x, scales["max"]) > 0.8
