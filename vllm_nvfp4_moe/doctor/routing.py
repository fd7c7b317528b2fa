"""Routers' logits of several kinds, and what plain arithmetic makes of them."""

from __future__ import annotations

import torch

from vllm_nvfp4_moe.doctor.shape import Shape

KINDS = ("uniform", "skewed", "all-negative", "tied")
"""``uniform``: each expert as often; ``skewed``: the n-th most popular one about as often as 1 / n;
``all-negative``: as uniform, with logits below zero, which a kernel that pads by zeros would pass
over; ``tied``: all chosen experts have the same logit, and so have all others."""

_BIAS = 0.005
"""The largest correction bias. It may not change a choice, so that no choice hangs on a rounding;
a kernel that lets it into the weights is seen where scores are small."""


def correction_bias(experts: int) -> torch.Tensor:
    """By which routers that score by sigmoid choose, float32 ``[experts]``."""
    return torch.linspace(-_BIAS, _BIAS, experts, device="cpu")


def make_logits(shape: Shape, tokens: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Float32 ``[tokens, experts]`` of one of ``KINDS``.

    Which experts are chosen is beyond doubt: their logits are 1.5 above all others', or more.
    """
    device, size = generator.device, (tokens, shape.experts)
    noise = torch.rand(size, device=device, generator=generator).clamp(1e-7, 1 - 1e-7)
    # Gumbel noise: the largest k are draws without replacement.
    score = -(-noise.log()).log()
    if kind == "skewed":
        rank = torch.randperm(shape.experts, device=device, generator=generator) + 1
        score = score - rank.log()
    chosen = score.topk(shape.top_k, dim=-1).indices
    spread = torch.rand(chosen.shape, device=device, generator=generator)
    others = -1.0 - torch.randn(size, device=device, generator=generator).abs()
    if kind == "tied":
        spread, others = torch.zeros_like(spread), torch.full_like(others, -1.0)
    logits = others.scatter(1, chosen, 0.5 + 2.5 * spread)
    return logits - 3.5 if kind == "all-negative" else logits


def route(shape: Shape, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's weights float32 ``[tokens, k]``, which add up to 1, and its choice of experts
    int32 ``[tokens, k]``, in float32 from the definitions."""
    if shape.router == "sigmoid":
        scores = logits.float().sigmoid()
        rank = scores + correction_bias(shape.experts).to(scores.device)
    else:
        scores = rank = logits.float().softmax(-1)
    ids = rank.topk(shape.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(1, keepdim=True), ids.int()
