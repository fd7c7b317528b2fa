"""The loss by depth: how far the states after a layer are from the source's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

_TOKENS = 4096
"""So many are compared at a time."""


class Depth(NamedTuple):
    """What one layer, and all before it, have lost.

    Attributes:
        layer: its number.
        experts: whether it has routed experts.
        error: ``norm(target - source) / norm(source)`` of what it returns, over all tokens; 0 to
            about 1.
        median_token: the same of the median token. A few tokens, such as the first of a text, can
            be so large that ``error`` is theirs alone.
        seconds: that it took, in both models.
    """

    layer: int
    experts: bool
    error: float
    median_token: float
    seconds: float


def distance(source: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """:attr:`Depth.error` and :attr:`Depth.median_token` of states ``[texts, tokens, ...]``."""
    rows = max(1, _TOKENS // source.shape[1])
    lost, whole = [], []
    for ours, theirs in zip(source.split(rows), target.split(rows), strict=True):
        flat = [part.flatten(0, 1).flatten(1).double() for part in (ours, theirs)]
        lost.append((flat[1] - flat[0]).square().sum(1))
        whole.append(flat[0].square().sum(1))
    noise, signal = torch.cat(lost), torch.cat(whole).clamp_min(1e-300)
    return math.sqrt(noise.sum() / signal.sum()), float((noise / signal).sqrt().median())
