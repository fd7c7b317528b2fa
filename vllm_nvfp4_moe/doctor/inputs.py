"""What kernels are run on: random tokens and weights; and plain arithmetic."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from quantize.nvfp4.format import BLOCK, E2M1_VALUES, dequantize
from vllm_nvfp4_moe.doctor.shape import Shape


class Batch(NamedTuple):
    """One call's input.

    Attributes:
        x: bf16 ``[tokens, hidden]``.
        weights, ids: float32 and int32 ``[tokens, k]``.
        logits: float32 ``[tokens, experts]``, that they come from, for kernels that route by
            themselves; None if there are none.
    """

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    logits: torch.Tensor | None = None


def batches(tokens: int) -> int:
    """How many to a graph."""
    return 8 if tokens <= 256 else 2 if tokens <= 2048 else 1


def batch(shape: Shape, tokens: int, skewed: bool, generator: torch.Generator) -> Batch:
    """Random tokens.

    Args:
        skewed: the n-th most popular expert is chosen about as often as 1 / n; which one that is
            differs from batch to batch, as from layer to layer of a model.
    """
    device = generator.device
    x = torch.randn(tokens, shape.hidden, device=device, generator=generator).bfloat16()
    weights = torch.rand(tokens, shape.top_k, device=device, generator=generator) + 0.1
    noise = torch.rand(tokens, shape.experts, device=device, generator=generator)
    # Gumbel noise: the largest k are draws without replacement.
    score = -(-noise.clamp(1e-7, 1 - 1e-7).log()).log()
    if skewed:
        rank = torch.randperm(shape.experts, device=device, generator=generator) + 1
        score = score - rank.log()
    ids = score.topk(shape.top_k, dim=-1).indices.int().contiguous()
    return Batch(x, weights / weights.sum(1, keepdim=True), ids)


class Stored(NamedTuple):
    """All experts' matrices: codes uint8 ``[experts, out, in / 2]``, E4M3 block scales
    ``[experts, out, in / 16]``, global scales float32 ``[experts]``."""

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor

    def weight(self, expert: int) -> torch.Tensor:
        """Float32 ``[out, in]``."""
        return dequantize(*(part[expert] for part in self))


def random_weights(shape: Shape, generator: torch.Generator) -> tuple[Stored, Stored]:
    """Gate above up, or without a gate up alone, and down: random codes, block scales from 1 to 15.

    What goes into the gate has a standard deviation of about 3, half or twice that for some
    experts; outputs are about as large.
    """
    device = generator.device

    def draw(*dims: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, dims, dtype=torch.uint8, device=device, generator=generator)

    def root_mean_square(values: torch.Tensor) -> float:
        return float(values.square().mean().sqrt())

    low, high = 0x38, 0x58  # 1 and 16
    every = torch.arange(low, high, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    unit = root_mean_square(torch.tensor(E2M1_VALUES)) * root_mean_square(every)

    def matrices(rows: int, columns: int, std: float) -> Stored:
        spread = draw(shape.experts, high=3).float() - 1
        return Stored(
            draw(shape.experts, rows, columns // 2),
            draw(shape.experts, rows, columns // BLOCK, low=low, high=high).view(
                torch.float8_e4m3fn
            ),
            (round(math.log2(std / unit)) + spread).exp2(),
        )

    rows = (shape.matrices - 1) * shape.intermediate
    w13 = matrices(rows, shape.hidden, 3 / math.sqrt(shape.hidden))
    return w13, matrices(shape.hidden, shape.intermediate, 0.5 / math.sqrt(shape.intermediate))


Biases = tuple[torch.Tensor, torch.Tensor]
"""Of w13 and of w2: bf16 ``[experts, rows]``."""


def random_biases(shape: Shape, generator: torch.Generator) -> Biases | None:
    """As large as half of what they are added to; None for experts without."""
    if not shape.biased:
        return None

    def draw(rows: int, std: float) -> torch.Tensor:
        noise = torch.randn(shape.experts, rows, device=generator.device, generator=generator)
        return (std * noise).bfloat16()

    return draw((shape.matrices - 1) * shape.intermediate, 1.5), draw(shape.hidden, 0.5)


def plain(
    shape: Shape, w13: Stored, w2: Stored, given: Batch, biases: Biases | None = None
) -> torch.Tensor:
    """The routed experts' output in float32, ``[tokens, hidden]``."""
    out = torch.zeros_like(given.x, dtype=torch.float32)
    for expert in given.ids.unique().tolist():
        token, slot = (given.ids == expert).nonzero(as_tuple=True)
        both = given.x[token].float() @ w13.weight(expert).T
        if biases is not None:
            both += biases[0][expert].float()
        result = shape.gate.apply_stacked(both) @ w2.weight(expert).T
        if biases is not None:
            result += biases[1][expert].float()
        out.index_add_(0, token, result * given.weights[token, slot].unsqueeze(1))
    return out


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Euclidean norm of the difference over that of ``other``; NaN if anything is."""
    other = other.float()
    return float((one.float() - other).norm() / other.norm())
