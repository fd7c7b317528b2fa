"""Finds a single wrong scale, which an output's error as a whole hardly shows: of a layer of
MiniMax-M3's sizes, a block of 16 weights that counts as zero changes an output by less than
bfloat16 rounds it.

What a wrong block changes is in one place. In a row of w2, it is one column of the output, for all
of an expert's tokens. In a row of w13, it is one number between the products; so all that the
output differs by has the direction of one column of w2. Roundings have no direction, and so each
number's error is compared with the others'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from quantize.nvfp4.format import BLOCK
from vllm_nvfp4_moe.doctor.cases import Weights
from vllm_nvfp4_moe.doctor.inputs import Batch
from vllm_nvfp4_moe.doctor.reference import Expert, Rounding, experts_of

_OUTSTANDING, _FEW_TOKENS = 2.5, 14.0
"""How many times the median of all columns' errors is more than roundings: with many tokens, and
what is added to 1 with one token. With n, it is divided by the square root of n."""
_LEAST = 0.05
"""Of what an average block's absence changes: smaller errors are not looked at."""
ENOUGH = 16
"""Tokens of an expert without which nothing is said of its scales: of fewer numbers, some block
explains anything."""
_EXPLAINED, _BY_TOKENS = 0.3, 160
"""What may be left of a place's errors, as sums of squares, where one wrong block explains them;
with fewer tokens than 48, less: their number over the second, since some block of thousands is
like anything short."""
_FEW_ALONE = 16
"""Of so many tokens, one may err by itself: with 4-bit activations, by a code on the other side. So
a block must also explain the errors of the others without the largest."""
_FACTORS = (0.0, -1.0, *(2.0**k for k in range(-2, 9) if k))
"""By which a scale may be wrong: left out, its sign, a power of two."""


class Place(NamedTuple):
    """A number of an expert whose errors stand out.

    Attributes:
        expert: its number.
        matrix: ``w13`` or ``w2``.
        row: of that matrix; of w13, the place in what the gate gives.
        ratio: of the number's error to the others'.
    """

    expert: int
    matrix: str
    row: int
    ratio: float


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


def outstanding(
    weights: Weights, given: Batch, rounding: Rounding, error: torch.Tensor, size: torch.Tensor
) -> list[Place]:
    """The numbers that stand out, those that do most first.

    Args:
        given: all tokens that were judged.
        error: float32 ``[tokens, hidden]``: the kernel's output minus the right one.
        size: float32 ``[tokens, 1]``: the root mean squares of the right ones.
    """
    relative = error / size.clamp_min(1e-30)
    found: list[Place] = []
    for expert in experts_of(weights, given, rounding):
        mine, count = relative[expert.token], len(expert.token)
        if count < ENOUGH:
            continue
        bound = max(_OUTSTANDING, 1 + _FEW_TOKENS / math.sqrt(count))
        columns = mine.square().mean(0).sqrt()
        length = expert.w2.square().sum(0).sqrt().clamp_min(1e-30)
        between = (mine @ expert.w2 / length).square().mean(0).sqrt()
        # What one block of w2's row is of an output's root mean square, with k experts a token; and
        # what one block of gate's or up's row is, in the direction that it has.
        block = BLOCK / (expert.w2.shape[1] * given.ids.shape[1])
        least = _LEAST * math.sqrt(block), _LEAST * math.sqrt(2 * block)
        for matrix, values, floor in (("w2", columns, least[0]), ("w13", between, least[1])):
            row = int(values.argmax())
            ratio = float(values[row] / values.median().clamp_min(1e-30))
            if ratio > bound and float(values[row]) > floor:
                found.append(Place(expert.number, matrix, row, ratio / bound))
    return sorted(found, key=lambda place: -place.ratio)


def wrong_scale(
    weights: Weights, given: Batch, rounding: Rounding, error: torch.Tensor, place: Place
) -> tuple[float, WrongScale] | None:
    """The block and the factor that explain the errors at ``place``, after the part that they leave
    unexplained; None if no single one does."""
    expert = Expert(weights, place.expert, given, rounding)
    mine = error[expert.token]
    rows = _w2(expert, mine, place.row) if place.matrix == "w2" else _w13(expert, mine, place.row)
    tried: list[tuple[float, WrongScale]] = []
    for row, observed, change in rows:
        size = observed.square()
        rest = size.argsort(descending=True)[max(1, len(size) // _FEW_ALONE) :]
        for factor in _FACTORS:
            left = (observed.unsqueeze(1) - change(factor)).square()
            block = int(left.sum(0).argmin())
            unexplained = max(
                float(left[tokens, block].sum() / size[tokens].sum().clamp_min(1e-30))
                for tokens in (slice(None), rest)
            )
            found = WrongScale(place.expert, place.matrix, row, block, factor)
            tried.append((unexplained, found))
    best = min(tried, key=lambda pair: pair[0])
    return best if best[0] < min(_EXPLAINED, len(mine) / _BY_TOKENS) else None


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
    """The same for gate's row, and for up's."""
    column = expert.w2[:, place]
    observed = error @ column / column.square().sum().clamp_min(1e-30)
    pre = expert.pre()
    inner = expert.w2.shape[1]
    own = [place, inner + place] if expert.gate.gated else [place]
    before = expert.gate.apply(*(pre[:, row] for row in own))
    for row in own:
        parts = _blocks(expert.x, expert.w13[row])

        def change(factor: float, row: int = row, parts: torch.Tensor = parts) -> torch.Tensor:
            values = [
                pre[:, each].unsqueeze(1) + ((factor - 1) * parts if each == row else 0)
                for each in own
            ]
            after = expert.gate.apply(*torch.broadcast_tensors(*values))
            return (after - before.unsqueeze(1)) * expert.factor

        yield row, observed, change
