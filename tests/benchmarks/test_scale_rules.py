"""The bench of scale rules: what it compares is what it says."""

from __future__ import annotations

import pytest
import torch

from benchmarks import scale_rules
from quantize.nvfp4.scales import RULES


def test_each_proposal_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {k: f"benchmarks.scale_rules:{v}" for k, v in scale_rules.PROPOSED.items()}
    monkeypatch.setattr(RULES, "_places", RULES._places | named)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = scale_rules.of_a_weight(weight, 1)
    error = {name: row.error for name, row in rows.items()}
    assert set(error) == set(RULES)
    # More scales tried, the same found; more global scales tried, and never a worse one taken.
    assert error["sweep-126"] == error["sweep-17"] == error["mse"]
    assert error["joint-16"] <= error["joint-4"] <= error["mse"] < error["unbiased"]
    assert error["joint-16"] < error["mse"]
    assert error["four-six-256"] != error["four-six"] < error["max"]
    assert all(row.seconds > 0 for row in rows.values())
