"""What the serving check takes for rounding, and what not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.serving_check import BOUND, SHARED, Token, compare, prompts


def answer(*tokens: tuple[int, dict[int, float]]) -> list[Token]:
    return [Token(*token) for token in tokens]


LONE = answer((5, {5: -0.1, 6: -3.0}), (7, {7: -1.0, 8: -1.1}), (9, {9: -0.5}))


def test_the_same() -> None:
    found = compare([LONE], [LONE], 3)
    assert (found.requests, found.different, found.gap, found.shift) == (1, 0, 0, 0)
    assert not found.problems


def test_a_near_tie_may_go_the_other_way_and_what_follows_is_not_compared() -> None:
    other = answer((5, {5: -0.3, 6: -3.0}), (8, {8: -1.0, 7: -1.05}), (1, {1: 0.0}))
    found = compare([LONE], [other], 3)
    assert not found.problems
    assert found.different == 1
    assert found.gap == pytest.approx(0.1)
    assert found.shift == pytest.approx(0.2)


@pytest.mark.parametrize(
    "token",
    [
        (8, {8: -0.2, 7: -0.2 - 1.1 * BOUND}),  # clear in this run
        (3, {3: -1.0, 7: -1.0}),  # not even among the lone run's likely ones
        (8, {8: -1.0}),  # the lone one's is not among this run's
    ],
)
def test_anything_else_is_wrong(token: tuple[int, dict[int, float]]) -> None:
    found = compare([LONE], [answer((5, {5: -0.1}), token, (9, {9: -0.5}))], 3)
    assert len(found.problems) == 1 and "request 0, token 1" in found.problems[0]
    assert found.gap > BOUND or math.isinf(found.gap)


def test_a_neighbours_answer_is_noticed() -> None:
    other = answer((4, {4: -0.1}), (4, {4: -0.1}), (4, {4: -0.1}))
    assert len(compare([LONE, other], [other, LONE], 3).problems) == 2


def test_a_short_answer_is_wrong() -> None:
    assert compare([LONE], [LONE[:2]], 3).problems == ["request 0: 2 tokens, alone 3"]


def test_prompts_differ_and_some_share_a_beginning(trained: Path) -> None:
    from transformers import AutoTokenizer

    asked = prompts(AutoTokenizer.from_pretrained(trained), 256)
    assert len({tuple(prompt) for prompt in asked}) == 256
    assert len({tuple(prompt[:SHARED]) for prompt in asked[::4]}) == 1
    assert 8 <= min(map(len, asked)) < 20 and 600 < max(map(len, asked)) < 700
