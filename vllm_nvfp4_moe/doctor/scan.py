"""Finds a single wrong scale, which an output's error as a whole hardly shows: of a layer of
MiniMax-M3's sizes, a block of 16 weights that counts as zero changes an output by less than
bfloat16 rounds it.

What a wrong block changes is in one place. In a row of w2, it is one column of the output, for all
of an expert's tokens. In a row of w13, it is one number between the products; so all that the
output differs by has the direction of one column of w2. And how much it is differs from token to
token as that block's part of the product does. Roundings do not: so errors are compared with what
each block adds (a matched filter), and a block that is wrong stands out of roundings that are
several times as large, the more the more tokens an expert has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from quantize.nvfp4.format import BLOCK
from vllm_nvfp4_moe.doctor.cases import Weights
from vllm_nvfp4_moe.doctor.inputs import Batch
from vllm_nvfp4_moe.doctor.reference import Expert, Rounding, experts_of

_OUTSTANDING = 6.0
"""Deviations of its roundings that a block's errors must be. Of the 450 million blocks of a layer
of MiniMax-M3's, roundings alone bring about one there."""
_KEPT = 1e-3
"""Of an output, what bfloat16 rounds at least."""
_UNEVEN = 3.0
"""Times the median token's, the largest noise that a token is taken to have."""
_LEAST = 0.2
"""Times what a block adds: smaller errors are no wrong scale, which changes a half or more."""
ENOUGH = 16
"""Tokens of an expert without which nothing is said of its scales: of fewer numbers, some block
explains anything."""
_EXPLAINED = 144.0
"""Squared deviations by which one wrong block must explain a place's errors: of 16 tokens, 0.9 of
their squares; of hundreds, 0.3. Some block of thousands is like anything short."""
_FEW_ALONE = 16
"""Of so many tokens, one may err by itself: with 4-bit activations, by a code on the other side. So
a block must also explain the errors of the others without the largest."""
_FACTORS = (0.0, -1.0, *(2.0**k for k in range(-2, 9) if k))
"""By which a scale may be wrong: left out, its sign, a power of two."""


class Place(NamedTuple):
    """A row of an expert's matrix, of which a block's errors stand out.

    Attributes:
        expert: its number.
        matrix: ``w13`` or ``w2``.
        row: of that matrix.
        deviations: that its most likely block's errors are, of those of roundings.
    """

    expert: int
    matrix: str
    row: int
    deviations: float


@dataclass(frozen=True)
class WrongScale:
    """A block scale that counts ``factor`` times what it should."""

    expert: int
    matrix: str
    row: int
    block: int
    factor: float

    def __str__(self) -> str:
        how = "is left out (counts as 0)" if self.factor == 0 else f"counts {self.factor:g} times"
        return (
            f"a block scale of expert {self.expert}: {self.matrix}'s, row {self.row}, block "
            f"{self.block}, {how}"
        )


def noise_of(error: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How large roundings are in each token's output, float32 ``[tokens, 1]``: the median error, so
    that one column's says nothing. Where a token's largest number is rounded another way, with 8
    bits, all its others may be; such a token tells less than the rest. But a wrong block of w13
    also changes all numbers of those that tell of it: so none counts for much less than most."""
    size = truth.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
    relative = error.abs().median(1, keepdim=True).values / size
    most = _UNEVEN * relative.median()
    return relative.minimum(most).clamp_min(_KEPT) * size


def outstanding(
    weights: Weights, given: Batch, rounding: Rounding, error: torch.Tensor, noise: torch.Tensor
) -> list[Place]:
    """The rows that stand out, the most likely first; of each matrix of an expert, one.

    Args:
        given: all tokens that were judged.
        error: float32 ``[tokens, hidden]``: the kernel's output minus the right one.
        noise: of :func:`noise_of`.
    """
    relative = error / noise
    found: list[Place] = []
    for expert in experts_of(weights, given, rounding):
        if len(expert.token) < ENOUGH:
            continue
        mine = relative[expert.token]
        factor = expert.factor / noise[expert.token]
        for matrix, fitted in (("w2", _fit_w2), ("w13", _fit_w13)):
            times, deviations = fitted(expert, mine, factor)
            deviations = deviations.masked_fill(times.abs() < _LEAST, 0.0)
            at = int(deviations.argmax())
            most = float(deviations.flatten()[at])
            if most > _OUTSTANDING:
                row = at // deviations.shape[1]
                found.append(Place(expert.number, matrix, row, most))
    return sorted(found, key=lambda place: -place.deviations)


def _fit_w2(
    expert: Expert, error: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many times each block adds too much, by least squares, and how many deviations of
    roundings that is; both ``[rows, blocks]``.

    Args:
        error, factor: ``[tokens, hidden]`` and ``[tokens, 1]``, both relative to tokens' noise.
    """
    middle = expert.seen(expert.gate.apply_stacked(expert.pre())) * factor
    blocks = middle.unflatten(1, (-1, BLOCK))
    squares = torch.einsum("tbi,tbj->bij", blocks, blocks)
    weight = expert.w2.unflatten(1, (-1, BLOCK))
    power = (torch.einsum("rbi,bij->rbj", weight, squares) * weight).sum(-1)
    product = ((error.T @ middle) * expert.w2).unflatten(1, (-1, BLOCK)).sum(-1)
    return _deviations(product, power, error.square().mean(0).sqrt().median())


def _fit_w13(
    expert: Expert, error: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, as far as the gate is a straight line around what goes into it. Inputs are random,
    so that a block adds as much as its weights are large."""
    length = expert.w2.square().sum(0).sqrt().clamp_min(1e-30)
    between = error @ expert.w2 / length  # what stands in the direction of each of w2's columns
    with torch.enable_grad():
        pre = expert.pre().requires_grad_()
        (slope,) = torch.autograd.grad(expert.gate.apply_stacked(pre).sum(), pre)
    parts = slope.shape[1] // len(length)
    slope = slope * factor * length.repeat(parts)
    x = expert.rounded(expert.x, 0)
    product = ((between.repeat(1, parts) * slope).T @ x) * expert.w13
    power = expert.w13.square() * x.square().mean() * slope.square().sum(0).unsqueeze(1)
    product, power = (each.unflatten(1, (-1, BLOCK)).sum(-1) for each in (product, power))
    return _deviations(product, power, between.square().mean(0).sqrt().median())


def _deviations(
    product: torch.Tensor, power: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    power = power.clamp_min(1e-30)
    return product / power, product.abs() / power.sqrt() / noise.clamp_min(1e-30)


def wrong_scale(
    weights: Weights,
    given: Batch,
    rounding: Rounding,
    error: torch.Tensor,
    noise: torch.Tensor,
    place: Place,
) -> tuple[float, WrongScale] | None:
    """The block and the factor that explain the errors at ``place``, after the part that they leave
    unexplained; None if no single one does."""
    expert = Expert(weights, place.expert, given, rounding)
    mine = error[expert.token]
    rows = _w2 if place.matrix == "w2" else _w13
    tried: list[tuple[float, WrongScale]] = []
    weight = noise[expert.token].square().reciprocal()
    for row, observed, change in rows(expert, mine, place.row):
        size = observed.square() * weight[:, 0]
        rest = size.argsort(descending=True)[max(1, len(size) // _FEW_ALONE) :]
        for factor in _FACTORS:
            left = (observed.unsqueeze(1) - change(factor)).square() * weight
            block = int(left.sum(0).argmin())
            unexplained = max(
                float(left[tokens, block].sum() / size[tokens].sum().clamp_min(1e-30))
                for tokens in (slice(None), rest)
            )
            found = WrongScale(place.expert, place.matrix, row, block, factor)
            tried.append((unexplained, found))
    best = min(tried, key=lambda pair: pair[0])
    return best if best[0] < len(mine) / (len(mine) + _EXPLAINED) else None


def _blocks(inputs: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """What each block of a row adds to a product, ``[tokens, blocks]``."""
    return (inputs * row).unflatten(-1, (-1, BLOCK)).sum(-1)


_Row = tuple[int, torch.Tensor, Callable[[float], torch.Tensor]]


def _w2(expert: Expert, error: torch.Tensor, row: int) -> Iterator[_Row]:
    """(row, errors ``[tokens]``, their change ``[tokens, blocks]`` by factor)."""
    middle = expert.seen(expert.gate.apply_stacked(expert.pre()))
    parts = _blocks(middle, expert.w2[row]) * expert.factor
    yield row, error[:, row], lambda factor: (factor - 1) * parts


def _w13(expert: Expert, error: torch.Tensor, place: int) -> Iterator[_Row]:
    """The same of a row of w13; and of the one that goes into the same gate with it."""
    inner = expert.w2.shape[1]
    column = expert.w2[:, place % inner]
    observed = error @ column / column.square().sum().clamp_min(1e-30)
    pre, x = expert.pre(), expert.rounded(expert.x, 0)
    own = [place % inner, inner + place % inner] if expert.gate.gated else [place]
    middle = expert.gate.apply_stacked(pre)
    before = expert.seen(middle)[:, [place % inner]]
    for row in own:
        parts = _blocks(x, expert.w13[row])

        def change(factor: float, row: int = row, parts: torch.Tensor = parts) -> torch.Tensor:
            values = [
                pre[:, each].unsqueeze(1) + ((factor - 1) * parts if each == row else 0)
                for each in own
            ]
            after = expert.gate.apply(*torch.broadcast_tensors(*values))
            return (_seen_at(expert, middle, place % inner, after) - before) * expert.factor

        yield row, observed, change


def _seen_at(
    expert: Expert, middle: torch.Tensor, place: int, values: torch.Tensor
) -> torch.Tensor:
    """What goes into the second product in place of ``middle[:, place]``, if the gate had given
    each of ``values`` ``[tokens, n]`` there: few bits keep a small change whole or not at all."""
    begin, at = place - place % BLOCK, place % BLOCK
    others = middle.abs()
    others[:, begin : begin + BLOCK] = 0
    # What its block's scale hangs on, and beside it a block that has the token's largest.
    near = middle[:, begin : begin + BLOCK].unsqueeze(1).repeat(1, values.shape[1], 2)
    near[:, :, at] = values
    near[:, :, BLOCK:] = 0
    near[:, :, BLOCK] = others.amax(1, keepdim=True)
    return expert.seen(near.flatten(0, 1))[:, at].view_as(values)
