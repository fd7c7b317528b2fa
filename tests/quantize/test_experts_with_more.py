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


class Declared(nn.Module):
    """Experts that say of themselves that a norm follows, as Transformers does from 5.20 on."""

    has_post_expert_norm = True

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.gate_up_proj = nn.Parameter(torch.empty(4, 96, 32))
        self.down_proj = nn.Parameter(torch.empty(4, 32, 48))
        self.post_expert_norm = nn.RMSNorm(32)

    def forward(
        self, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        norm, final = self.post_expert_norm, torch.zeros_like(hidden_states)
        for expert in ids.unique():
            token, slot = torch.where(ids == expert)
            both = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert])
            gate, up = both.chunk(2, dim=-1)
            own = nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj[expert])
            weight = weights[token, slot, None]
            match self.place:
                case "before the weight":
                    own = norm(own) * weight
                case "after the weight":
                    own = norm(own * weight)
                case "twice":
                    own = norm(norm(own)) * weight
                case _:
                    own = own * weight
            final.index_add_(0, token, own)
        return norm(final) if self.place == "of the sum" else final


def test_a_norm_that_is_declared() -> None:
    check_product(Declared("before the weight"), Gate("silu").apply_stacked)


@pytest.mark.parametrize("place", ["after the weight", "twice", "of the sum", "nowhere"])
def test_a_norm_that_is_declared_and_elsewhere(place: str) -> None:
    with pytest.raises(MoreThanProductError, match="after the last GEMM"):
        check_product(Declared(place), Gate("silu").apply_stacked)
