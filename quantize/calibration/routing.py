"""The inputs of one layer's experts: tokens, which expert each goes to, and with what weight."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import NamedTuple

import torch

from quantize.calibration.room import has_room

CHUNK = 8192
"""So many tokens of an expert are computed at a time."""


class Chunk(NamedTuple):
    """Some of one expert's tokens.

    Attributes:
        tokens: their numbers among all tokens, int64 ``[n]``.
        x: their hidden states, float ``[n, hidden]``.
        weights: the router's weights of them, float32 ``[n]``.
        pairs: the positions of these weights among those of all tokens, flattened from
            ``[tokens, k]``: int64 ``[n]``.
        gradient: the loss's gradient with respect to the sum of the layer's experts, float32
            ``[n, hidden]``; None where it is not known.
    """

    tokens: torch.Tensor
    x: torch.Tensor
    weights: torch.Tensor
    pairs: torch.Tensor
    gradient: torch.Tensor | None


class Routing:
    """All calibration tokens at the experts of one layer.

    Args:
        x: hidden states, ``[tokens, hidden]``.
        ids: the experts that each token goes to, int32 ``[tokens, k]``.
        weights: the router's weights, float32 ``[tokens, k]``.
        experts: how many experts the layer has.
        device: where chunks go.
        gradient: float32 ``[tokens, hidden]``, see :class:`Chunk`.

    Attributes:
        x: as given.
        given: x, ids, weights and gradient, as given.
        counts: how many tokens each expert gets, int64 ``[experts]``.
    """

    def __init__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        experts: int,
        device: torch.device,
        gradient: torch.Tensor | None = None,
    ) -> None:
        self.x = x
        self.given = x, ids, weights, gradient
        self._x, self._gradient = _near(x, gradient, device)
        self._weights = weights.flatten()
        self._k = ids.shape[1]
        self._device = device
        flat = ids.flatten().long()
        order = flat.argsort(stable=True)
        self.counts = torch.bincount(flat, minlength=experts)
        self._parts = order.split(self.counts.tolist())

    def on(self, device: torch.device) -> Routing:
        """Return the same tokens, whose chunks go to ``device``."""
        if device == self._device:
            return self
        other = copy(self)
        other._device = device
        other._x, other._gradient = _near(self._x, self._gradient, device)
        return other

    def of(self, expert: int) -> Iterator[Chunk]:
        """Yield one expert's tokens, in the order of all tokens."""
        for part in self._parts[expert].split(CHUNK):
            if part.numel():
                weights = self._weights[part].to(self._device)
                yield self._chunk_of(part // self._k, weights, part)

    def all(self) -> Iterator[Chunk]:
        """Yield every token as if it went to one expert with weight 1; :attr:`Chunk.pairs` are
        empty."""
        for tokens in torch.arange(len(self.x)).split(CHUNK):
            yield self._chunk_of(tokens, torch.ones(len(tokens), device=self._device), tokens[:0])

    def _chunk_of(self, tokens: torch.Tensor, weights: torch.Tensor, pairs: torch.Tensor) -> Chunk:
        def rows(of: torch.Tensor) -> torch.Tensor:
            return of[tokens.to(of.device)].to(self._device)

        gradient = None if self._gradient is None else rows(self._gradient)
        return Chunk(tokens, rows(self._x), weights, pairs, gradient)


def _near(
    x: torch.Tensor, gradient: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return hidden states and gradients on a GPU with room for them, else as they are: from the
    host, each expert's rows would be gathered and sent anew, more than once."""
    if has_room(device, x.nbytes + (0 if gradient is None else gradient.nbytes)):
        return x.to(device), None if gradient is None else gradient.to(device)
    return x, gradient
