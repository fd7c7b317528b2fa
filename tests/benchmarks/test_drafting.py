"""Counting what a head guesses, by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks import drafting


def test_a_guess_that_is_right_brings_a_token_that_nobody_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafting, "PROMPT", 2)
    rows, texts = [[5, 6], [5, 6]], [[7, 8, 9, 1, 2], [7, 8, 9, 1, 2]]
    # The guess for token i + 2 at position i. Of the text's last four, the first row's are all
    # right: 8 is drafted, 9 comes with it, 1 is drafted, 2 comes with it. The second row's are
    # wrong, right, wrong, right: 8, 9 and 2 are drafted, 1 comes with 9.
    guesses = torch.tensor([[0, 8, 9, 1, 2, 0], [0, 3, 9, 3, 2, 0]])

    def head(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert ids.tolist() == [r + t for r, t in zip(rows, texts, strict=True)]
        logits = torch.nn.functional.one_hot(guesses, 10).float()
        return logits, logits

    assert drafting.counted(head, rows, texts) == [(2, 2), (3, 2)]  # type: ignore[arg-type]


def test_the_error_is_over_rows() -> None:
    # Two rows, of which one guesses all and one nothing: tokens of a row are as one.
    assert drafting.told("x", [(100, 100), (100, 0)]) == "x: 100 of 200, 0.500 +- 0.354"
