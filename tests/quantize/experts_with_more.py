"""Experts that do more than GEMM, gate, GEMM, in the place of Qwen3-MoE's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.models.qwen3_moe import modeling_qwen3_moe

Tensor = torch.Tensor


class Plain:
    """What each kind changes; this one changes nothing."""

    def __init__(self, module: Any, experts: int, hidden: int, inner: int) -> None:
        self.module = module

    def x(self, x: Tensor, expert: Tensor) -> Tensor:
        return x

    def inner(self, inner: Tensor, expert: Tensor) -> Tensor:
        return inner

    def own(self, own: Tensor, x: Tensor, expert: Tensor) -> Tensor:
        return own

    def weight(self, weight: Tensor) -> Tensor:
        return weight

    def sum(self, total: Tensor) -> Tensor:
        return total


class PostNorm(Plain):
    """Muse Spark's (Transformers 5.20, ``has_post_expert_norm``): a norm of down's output, before
    the router's weight."""

    def __init__(self, module: Any, experts: int, hidden: int, inner: int) -> None:
        super().__init__(module, experts, hidden, inner)
        module.post_expert_norm = nn.RMSNorm(hidden, eps=1e-6)

    def own(self, own: Tensor, x: Tensor, expert: Tensor) -> Tensor:
        return self.module.post_expert_norm(own)


class PlainPostNorm(Plain):
    """Without a weight: nothing in the checkpoint tells of it."""

    def own(self, own: Tensor, x: Tensor, expert: Tensor) -> Tensor:
        return nn.functional.rms_norm(own, own.shape[-1:])


class InnerNorm(Plain):
    """Between the gate and down."""

    def __init__(self, module: Any, experts: int, hidden: int, inner: int) -> None:
        super().__init__(module, experts, hidden, inner)
        module.inner_norm = nn.RMSNorm(inner, eps=1e-6)

    def inner(self, inner: Tensor, expert: Tensor) -> Tensor:
        return self.module.inner_norm(inner)


class InputNorm(Plain):
    def __init__(self, module: Any, experts: int, hidden: int, inner: int) -> None:
        super().__init__(module, experts, hidden, inner)
        module.input_norm = nn.RMSNorm(hidden, eps=1e-6)

    def x(self, x: Tensor, expert: Tensor) -> Tensor:
        return self.module.input_norm(x)


class ExpertScale(Plain):
    """A learned scale of each expert's output."""

    def __init__(self, module: Any, experts: int, hidden: int, inner: int) -> None:
        super().__init__(module, experts, hidden, inner)
        module.expert_scale = nn.Parameter(torch.ones(experts))

    def own(self, own: Tensor, x: Tensor, expert: Tensor) -> Tensor:
        return own * self.module.expert_scale[expert]


class InnerScale(Plain):
    """A learned scale of each channel between the gate and down, 1 where its parameter is 0."""

    def __init__(self, module: Any, experts: int, hidden: int, inner: int) -> None:
        super().__init__(module, experts, hidden, inner)
        module.inner_scale = nn.Parameter(torch.zeros(inner))

    def inner(self, inner: Tensor, expert: Tensor) -> Tensor:
        return inner * (1 + self.module.inner_scale)


class OutputMultiplier(Plain):
    def own(self, own: Tensor, x: Tensor, expert: Tensor) -> Tensor:
        return own * 0.5


class Residual(Plain):
    def own(self, own: Tensor, x: Tensor, expert: Tensor) -> Tensor:
        return own + x


class ResidualOfTheSum(Plain):
    def sum(self, total: Tensor) -> Tensor:
        return total + 0.25


class WeightOfTheInput(Plain):
    """The router's weight is applied to the experts' input."""

    def x(self, x: Tensor, expert: Tensor) -> Tensor:
        return x * 0.5


class NormedWeights(Plain):
    """The router's weights are changed inside of the experts."""

    def weight(self, weight: Tensor) -> Tensor:
        return weight.sqrt()


class LowRank(Plain):
    """A third product for each expert, as of an adapter."""

    def __init__(self, module: Any, experts: int, hidden: int, inner: int) -> None:
        super().__init__(module, experts, hidden, inner)
        module.low = nn.Parameter(torch.zeros(experts, 4, hidden))
        module.high = nn.Parameter(torch.zeros(experts, hidden, 4))

    def own(self, own: Tensor, x: Tensor, expert: Tensor) -> Tensor:
        low = nn.functional.linear(own, self.module.low[expert])
        return own + nn.functional.linear(low, self.module.high[expert])


KINDS: list[type[Plain]] = [
    PostNorm, PlainPostNorm, InnerNorm, InputNorm, ExpertScale, InnerScale, OutputMultiplier,
    Residual, ResidualOfTheSum, WeightOfTheInput, NormedWeights, LowRank,
]  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, kind: type[Plain]) -> None:
    """Give Qwen3-MoE experts of this kind, written as Transformers writes them."""

    @use_experts_implementation
    class OwnExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            hidden, inner = config.hidden_size, config.moe_intermediate_size
            self.num_experts = config.num_experts
            self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, hidden))
            self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, inner))
            self.act_fn = ACT2FN[config.hidden_act]
            self.sizes = self.num_experts, hidden, inner
            kind(self, *self.sizes)

        def forward(
            self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
        ) -> Tensor:
            change = kind.__new__(kind)
            change.module = self
            final = torch.zeros_like(hidden_states)
            for expert in top_k_index.unique():
                token, slot = torch.where(top_k_index == expert)
                x = hidden_states[token]
                projected = nn.functional.linear(change.x(x, expert), self.gate_up_proj[expert])
                gate, up = projected.chunk(2, dim=-1)
                inner = change.inner(self.act_fn(gate) * up, expert)
                own = nn.functional.linear(inner, self.down_proj[expert])
                weight = change.weight(top_k_weights[token, slot, None])
                own = change.own(own, x, expert) * weight
                final.index_add_(0, token, own.to(final.dtype))
            return change.sum(final)

    monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeExperts", OwnExperts)
