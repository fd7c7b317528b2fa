"""Magnitudes of inputs are counted on a GPU as on the host, so that input scales are the same.

pytest tests/gpu/test_input_scales.py
"""

from __future__ import annotations

import math

import pytest
import torch

from quantize.nvfp4.input_scales import INPUT_RULES
from tests.quantize.test_input_scales import inputs, seen, spread


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", INPUT_RULES)
def test_scales_are_those_of_the_host(rule: str, dtype: torch.dtype) -> None:
    for sigma in (0.1, 1.0, 4.0):
        x = inputs(spread(sigma)).to(dtype)
        assert INPUT_RULES[rule](seen(x.cuda())) == INPUT_RULES[rule](seen(x))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_damaged_input_is_not_lost(bad: float) -> None:
    x = torch.ones(3, 64, dtype=torch.bfloat16, device="cuda")
    x[1, 17] = bad
    assert not math.isfinite(seen(x).largest)
