"""What two models predict for the same tokens: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import torch

from quantize.calibration.store import states_name
from quantize.evaluate.side import Side

LOGITS = 2**25
"""About so many logits of a model are in memory at a time."""


class Row(NamedTuple):
    """Sums over the tokens of one text but the first, which nothing predicts.

    Attributes:
        source, target: of ``-log p(token)``, in nats.
        kl: of the divergences KL(source || target) of the predictions, in nats.
        same: how often both have the same most likely token.
        tokens: how many they are.
    """

    source: float
    target: float
    kl: float
    same: int
    tokens: int


class Figures(NamedTuple):
    """What the predictions of a whole text say. Errors are standard errors by the spread over its
    rows, None if there is one row.

    Attributes:
        before, after: the perplexities of source and target.
        change: of the perplexity, in per cent; and its error, that of both on the same tokens.
        kl: mean of KL(source || target) a token, in nats.
        top1: the share of tokens at which both have the same most likely one.
        tokens: that were predicted.
    """

    before: float
    after: float
    change: float
    change_error: float | None
    kl: float
    kl_error: float | None
    top1: float
    tokens: int


def row_of(source: Side, target: Side, samples: torch.Tensor, row: int) -> Row:
    """Compare the predictions for one text. Both models' ends must be loaded.

    Args:
        samples: tokens, int64 ``[num_samples, sequence_length]``.

    Raises:
        QuantizeError: naming the checkpoint whose logits are NaN or infinite.
    """
    text = samples[row : row + 1]
    states = [
        tuple(part[row : row + 1] for part in side.store.open_all(states_name(side.model.last + 1)))
        for side in (source, target)
    ]
    vocabulary = source.model.model.config.get_text_config().vocab_size
    before, after, kl, same = 0.0, 0.0, 0.0, 0
    for positions in torch.arange(text.shape[1] - 1).split(max(1, LOGITS // vocabulary)):
        logits = []
        for side, own in zip((source, target), states, strict=True):
            # Some models change a layer's output in place.
            copies = tuple(part.clone() for part in own)
            found = side.end.logits(text, copies, positions)[0]
            logits.append(found.to(torch.promote_types(found.dtype, torch.float32)))
        ours, theirs = (part.log_softmax(-1) for part in logits)
        next_tokens = text[0, positions + 1].to(ours.device).unsqueeze(1)
        before -= float(ours.gather(1, next_tokens).double().sum())
        after -= float(theirs.gather(1, next_tokens).double().sum())
        kl += float(_divergence(ours, theirs).double().sum())
        same += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
    return Row(before, after, kl, same, text.shape[1] - 1)


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(ours || theirs) of log-probabilities ``[n, vocabulary]``: ``[n]``."""
    p = ours.exp()
    # What is impossible, such as a padded vocabulary's logits of -inf, adds nothing.
    return torch.where(p > 0, p * (ours - theirs), 0.0).sum(-1)


def figures_of(rows: Sequence[Row]) -> Figures:
    """The whole from its rows, which have equally many tokens."""
    before, after, kl, changes = (
        [each / row.tokens for each, row in zip(column, rows, strict=True)]
        for column in (
            [row.source for row in rows],
            [row.target for row in rows],
            [row.kl for row in rows],
            [row.target - row.source for row in rows],
        )
    )
    tokens = sum(row.tokens for row in rows)
    change, spread = fmean(changes), _error(changes)
    return Figures(
        _of(math.exp, fmean(before)),
        _of(math.exp, fmean(after)),
        100 * _of(math.expm1, change),
        None if spread is None else 100 * _of(math.exp, change) * spread,
        fmean(kl),
        _error(kl),
        sum(row.same for row in rows) / tokens,
        tokens,
    )


def _of(function: Callable[[float], float], value: float) -> float:
    """What a checkpoint that has lost everything makes may be too large for a float."""
    try:
        return function(value)
    except OverflowError:
        return math.inf


def _error(values: list[float]) -> float | None:
    """The standard error of their mean; None too where one is infinite: a token was impossible."""
    if not all(map(math.isfinite, values)):
        return None
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
