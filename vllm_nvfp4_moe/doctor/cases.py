"""The batches that each kernel is given, and the weights of its layer: the same in each process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX
from vllm_nvfp4_moe.doctor.inputs import (
    Batch,
    Biases,
    Stored,
    random_biases,
    random_weights,
)
from vllm_nvfp4_moe.doctor.routing import KINDS, make_logits, route
from vllm_nvfp4_moe.doctor.shape import Shape

TOKENS = (1, 2, 8, 16, 64, 192, 256, 1024, 8192)
QUICK_TOKENS = (1, 64, 256)


@dataclass(frozen=True)
class Weights:
    """All experts of a layer.

    Attributes:
        input_scales: of w13 and w2, float32 ``[experts]``: no two neighbours' are equal, so that it
            is seen whose a kernel takes.
    """

    shape: Shape
    w13: Stored
    w2: Stored
    biases: Biases | None
    input_scales: tuple[torch.Tensor, torch.Tensor]


@lru_cache(maxsize=1)
def make_weights(shape: Shape, device: torch.device) -> Weights:
    """Random ones; the same whenever it is called."""
    generator = torch.Generator(device).manual_seed(0)
    w13, w2 = random_weights(shape, generator)
    # No powers of two, which would not change how a block is rounded.
    apart = 1 + 0.35 * (torch.arange(shape.experts, device=device) % 3)
    largest = torch.tensor(24.0)  # of what goes into a gate, which has a deviation of 3, or 6
    middle = float(shape.gate.apply(largest, largest).abs())
    full = E2M1_MAX * E4M3_MAX
    scales = 6.0 / full * apart, middle / full * apart
    return Weights(shape, w13, w2, random_biases(shape, generator), scales)


class Case(NamedTuple):
    """One call: how many tokens, and one of ``routing.KINDS``."""

    tokens: int
    routing: str

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.routing}"


def all_cases(tokens: Iterable[int]) -> list[Case]:
    """Those with few tokens first."""
    return [Case(count, kind) for count in sorted(tokens) for kind in KINDS]


def make_batch(shape: Shape, case: Case, device: torch.device, again: int = 0) -> Batch:
    """The inputs of ``case``, routed by plain arithmetic; the same whenever it is called.

    Args:
        again: other inputs for each number.
    """
    seed = (1 + again) * 100_000 + case.tokens * len(KINDS) + KINDS.index(case.routing)
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.tokens, shape.hidden, device=device, generator=generator).bfloat16()
    logits = make_logits(shape, case.tokens, case.routing, generator)
    return Batch(x, *route(shape, logits), logits)


def judged(tokens: int, most: int) -> torch.Tensor:
    """The tokens whose outputs are compared: all of them, or ``most`` from the first to the last,
    at uneven distances."""
    if tokens <= most:
        return torch.arange(tokens)
    at = torch.linspace(0, 1, most) ** 1.5
    return (at * (tokens - 1)).round().long().unique()


def together(batches: Iterable[Batch]) -> Batch:
    """One batch of all tokens."""
    x, weights, ids = zip(*(given[:3] for given in batches), strict=True)
    return Batch(torch.cat(x), torch.cat(weights), torch.cat(ids))


def some(given: Batch, tokens: torch.Tensor) -> Batch:
    """These tokens of it."""
    at = tokens.to(given.x.device)
    return Batch(*(None if part is None else part[at] for part in given))  # type: ignore[arg-type]
