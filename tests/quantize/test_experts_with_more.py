"""Experts that do more than GEMM, gate, GEMM are refused, whatever it is and wherever it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantize.errors import QuantizeError
from quantize.experts.gates import Gate, Gates
from quantize.experts.gates.drive import MoreThanProductError, check_product
from quantize.experts.identify import identify_config
from tests.quantize import checkpoints
from tests.quantize.experts_with_more import KINDS, Plain, install


def test_plain_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Plain)
    assert identify_config(checkpoints.qwen3_moe()) == Gates.uniform(Gate("silu"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whatever_it_is(kind: type[Plain], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, kind)
    with pytest.raises(QuantizeError, match=r"OwnExperts: .*GEMM, gate, GEMM"):
        identify_config(checkpoints.qwen3_moe())


class Expert(nn.Module):
    """One expert of a list of them, as checkpoints with code of their own have."""

    def __init__(self, norm: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(32, 48, bias=bias) for _ in range(2))
        self.down = nn.Linear(48, 32, bias=bias)
        self.norm = nn.RMSNorm(32) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


def test_one_expert_of_a_list() -> None:
    gate = Gate("silu").apply_stacked
    check_product(Expert(), gate)
    check_product(Expert(bias=True), gate)  # biases are known
    with pytest.raises(MoreThanProductError, match="after the last GEMM"):
        check_product(Expert(norm=True), gate)
    with pytest.raises(MoreThanProductError, match="between"):
        check_product(Expert(), Gate("gelu").apply_stacked)
