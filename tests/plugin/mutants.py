"""Faults put into a CUDA source on purpose, each behind a switch of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

OUTSIDE = "reads or writes|from outside of any tensor|wrote beside"
"""What the emulation says of an index that is wrong."""


@dataclass(frozen=True)
class Mutant:
    """A part of a source, and what is in its place.

    Attributes:
        part: an expression, or statements that end with a semicolon.
        of: how often the source has it.
        number: which of those it is.
        tokens: of the batch that shows it.
        said: a regular expression for what must be said with one of the seeds; by default that the
            output is wrong.
        map: whether there is a map of experts.
    """

    part: str
    instead: str
    of: int = 1
    number: int = 0
    tokens: int = 4
    said: str = "wrong output"
    map: bool = False


def with_switches(source: str, mutants: Iterable[Mutant]) -> str:
    """``source`` with all of the mutants in it, each behind the switch of its number."""
    places: dict[tuple[int, str], list[tuple[int, str]]] = {}
    for switch, mutant in enumerate(mutants):
        assert source.count(mutant.part) == mutant.of, mutant
        start = [found.start() for found in re.finditer(re.escape(mutant.part), source)]
        places.setdefault((start[mutant.number], mutant.part), []).append((switch, mutant.instead))
    end = len(source)
    for (start, part), choices in sorted(places.items(), reverse=True):
        assert start + len(part) <= end, f"{part} is part of another"
        end = start
        text = part if part.endswith(";") else f"({part})"
        for switch, instead in choices:
            if part.endswith(";"):
                text = f"if (mutated({switch})) {{ {instead} }} else {{ {text} }}"
            else:
                text = f"(mutated({switch}) ? ({instead}) : {text})"
        source = source[:start] + text + source[start + len(part) :]
    return source
