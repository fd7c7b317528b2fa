"""Rows of tokens from several texts, mixed evenly."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Protocol, TypeVar

T = TypeVar("T")


class Rows(Protocol):
    """Where rows of tokens come from."""

    def row(self) -> list[int]:
        """Return the next row; at the end what is left, which is shorter, and then nothing."""


class Text:
    """One text. Its rows come from all of the part of it that is read ahead.

    Args:
        tokens: of it, in pieces of any length.
        length: tokens of a row.
        ahead: how many rows are read at a time.
    """

    def __init__(self, tokens: Iterable[Sequence[int]], length: int, ahead: int) -> None:
        self._tokens: Iterator[int] = chain.from_iterable(tokens)
        self._length, self._ahead = length, ahead
        self._rows: deque[list[int]] = deque()

    def row(self) -> list[int]:
        """See :class:`Rows`."""
        if not self._rows:
            read: list[list[int]] = []
            while len(read) < self._ahead and (row := list(islice(self._tokens, self._length))):
                read.append(row)
            short = [read.pop()] if read and len(read[-1]) < self._length else []
            self._rows.extend([*spread(read), *short])
        return self._rows.popleft() if self._rows else []


class Mixture:
    """Texts, or mixtures of texts, that take turns; those that end leave their turns to the others.

    So each gives as many rows as any other, if it has them. What is left at the ends of texts makes
    rows too, one text's after the other's.

    Args:
        length: tokens of a row.
    """

    def __init__(self, parts: Iterable[Rows], length: int) -> None:
        self._turns = deque(parts)
        self._length = length
        self._left: list[int] = []

    def row(self) -> list[int]:
        """See :class:`Rows`."""
        while self._turns:
            row = self._turns[0].row()
            if len(row) == self._length:
                self._turns.rotate(-1)
                return row
            self._turns.popleft()
            self._left += row
            if len(self._left) >= self._length:
                break
        row, self._left = self._left[: self._length], self._left[self._length :]
        return row


def spread(things: Sequence[T]) -> list[T]:
    """Return ``things`` in an order of which any beginning is from all of them: van der Corput's,
    by their numbers' bits in reverse."""
    bits = max(1, (len(things) - 1).bit_length())
    order = sorted(range(len(things)), key=lambda n: int(f"{n:0{bits}b}"[::-1], 2))
    return [things[n] for n in order]
