"""What one layer's experts are given: tokens, who gets which, and with what weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

CHUNK = 8192
"""Tokens of an expert that are computed at a time."""


class Chunk(NamedTuple):
    """Some of one expert's tokens.

    Attributes:
        rows: their numbers among all tokens, int64 ``[n]``.
        x: float ``[n, hidden]``.
        weights: the router's, float32 ``[n]``.
        pairs: where those are among all tokens' ``[tokens * k]``, int64 ``[n]``.
        gradient: the loss's by what the layer's experts together return, float32 ``[n, hidden]``;
            None where it is not known.
    """

    rows: torch.Tensor
    x: torch.Tensor
    weights: torch.Tensor
    pairs: torch.Tensor
    gradient: torch.Tensor | None


class Routing:
    """All calibration tokens at the experts of one layer.

    Args:
        x: ``[tokens, hidden]``.
        ids: int32 ``[tokens, k]``; weights: float32 ``[tokens, k]``.
        device: where chunks go.
        chunk: tokens in one.
        gradient: float32 ``[tokens, hidden]``, see :class:`Chunk`.
    """

    def __init__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: int,
        device: torch.device,
        chunk: int = CHUNK,
        gradient: torch.Tensor | None = None,
    ) -> None:
        self.x = x
        self._gradient = gradient
        self._weights = weights.flatten()
        self._k = ids.shape[1]
        self._device = device
        self._chunk = chunk
        flat = ids.flatten().long()
        order = flat.argsort(stable=True)
        self.counts = torch.bincount(flat, minlength=experts)
        """Tokens of each expert, int64 ``[experts]``; LongCat's zero experts come after them."""
        self._parts = order.split(self.counts.tolist())

    def of(self, expert: int) -> Iterator[Chunk]:
        """One expert's tokens, in the order of all tokens."""
        for part in self._parts[expert].split(self._chunk):
            if part.numel():
                weights = self._weights[part].to(self._device)
                yield self._chunk_of(part // self._k, weights, part)

    def all(self) -> Iterator[Chunk]:
        """Every token, as if it went to one expert with weight 1; :attr:`Chunk.pairs` are empty."""
        for rows in torch.arange(len(self.x)).split(self._chunk):
            yield self._chunk_of(rows, torch.ones(len(rows), device=self._device), rows[:0])

    def _chunk_of(self, rows: torch.Tensor, weights: torch.Tensor, pairs: torch.Tensor) -> Chunk:
        gradient = None if self._gradient is None else self._gradient[rows].to(self._device)
        return Chunk(rows, self.x[rows].to(self._device), weights, pairs, gradient)
