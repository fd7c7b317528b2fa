"""What ``benchmarks.hopper_tiles`` measured, and the tables that a kernel would choose by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

DECODING = 48
"""Tokens an expert up to which a kernel chooses by rows (``BY_ROWS``), else by tokens."""
MORE = 0.01
"""One more line in a table must save so much of the time, in the mean of all batches."""


@dataclass
class Point:
    """One layer, kernel and number of tokens.

    Attributes:
        floor: ms.
        each: tokens of an expert, if all are chosen as often.
        rows: tiles of 64 rows that a multiprocessor has of the first product, with one token each.
        chosen: the tile shape that ``choose_tile_shape`` says.
        ms: by tile shape; with a ``+`` tiles are taken by a counter.
        beside: ms by "tile shape, other", and of the other alone.
    """

    layer: str
    kernel: str
    tokens: int
    floor: float
    each: float
    rows: float
    chosen: str
    ms: dict[str, float]
    beside: dict[str, float] = field(default_factory=dict)

    @property
    def dealt(self) -> dict[str, float]:
        """Without those by a counter."""
        return {name: ms for name, ms in self.ms.items() if not name.endswith("+")}

    @property
    def best(self) -> str:
        return min(self.dealt, key=self.dealt.__getitem__)

    def __str__(self) -> str:
        times = ", ".join(
            f"{name} {ms:.4f} ({self.floor / ms:.2f})" for name, ms in sorted(self.ms.items())
        )
        lost = self.ms[self.chosen] / self.ms[self.best] - 1 if self.chosen in self.ms else math.nan
        lines = [
            f"{self.kernel} {self.layer}, {self.tokens} tokens ({self.each:.2f} an expert, "
            f"{self.rows:.2f} row tiles): {times}; best {self.best}, "
            f"chosen {self.chosen} ({100 * lost:+.1f} %)"
        ]
        for what in ("shared", "held"):
            if what in self.beside:
                both = ", ".join(
                    f"{name.split()[0]} {ms:.4f} ({ms / self.ms[name.split()[0]]:.2f})"
                    for name, ms in sorted(self.beside.items())
                    if name.endswith(f" {what}")
                )
                lines.append(f"    beside {what} ({self.beside[what]:.4f} alone): {both}")
        return "\n".join(lines)


Line = tuple[float, str]
"""Up to which number, and the tile shape."""


def fitted(
    points: Sequence[Point], of: Callable[[Point], float], names: Sequence[str]
) -> list[Line]:
    """The table that loses the least to the fastest of ``names``, in the mean of logarithms."""
    points = sorted((p for p in points if any(n in p.dealt for n in names)), key=of)
    if not points:
        return []

    def lost(point: Point, name: str) -> float:
        fastest = min(ms for other, ms in point.dealt.items() if other in names)
        return math.log(point.dealt[name] / fastest) if name in point.dealt else 1.0

    # Of the first points, the cost and the lines. A line ends between two numbers that differ.
    cheapest: list[tuple[float, list[Line]]] = [(0.0, [])]
    for end in range(1, len(points) + 1):
        choices = [(math.inf, list[Line]())]
        if end == len(points) or of(points[end - 1]) < of(points[end]):
            most = math.inf if end == len(points) else middle(of(points[end - 1]), of(points[end]))
            for begin in range(end):
                cost, lines = cheapest[begin]
                for name in names:
                    here = sum(lost(p, name) for p in points[begin:end])
                    total = cost + here + MORE * len(points) * bool(lines)
                    choices.append((total, [*lines, (most, name)]))
        cheapest.append(min(choices, key=lambda choice: choice[0]))
    return cheapest[-1][1]


def middle(low: float, high: float) -> float:
    """A short number between the two, in the middle of their logarithms."""
    return float(f"{math.sqrt(low * high):.2g}") if high > 1.3 * low else (low + high) / 2


def taken(lines: Sequence[Line], number: float) -> str:
    return next(name for most, name in lines if number <= most)


def loss(points: Iterable[Point], choose: Callable[[Point], str]) -> str:
    """What choices cost beside the fastest of all tile shapes."""
    lost = {
        f"{p.layer} {p.tokens}": p.ms[choose(p)] / p.ms[p.best] for p in points if choose(p) in p.ms
    }
    if not lost:
        return "nothing measured"
    worst = max(lost, key=lost.__getitem__)
    mean = statistics.geometric_mean(lost.values())
    return f"{100 * mean - 100:.2f} % in the mean, {100 * lost[worst] - 100:.1f} % for {worst}"


def report(points: Sequence[Point]) -> str:
    """Tables for each kernel, what they and the present choice lose, what the counter costs."""
    out = []
    for kernel in sorted({p.kernel for p in points}):
        mine = [p for p in points if p.kernel == kernel]
        many = sorted({n for p in mine for n in p.dealt if not n.startswith("8x")})
        few = [n for n in many if n.startswith("64x")]
        decoding = [p for p in mine if p.each <= DECODING]
        prefill = [p for p in mine if p.each > DECODING]
        out.append(f"\n{kernel}: the present choice loses {loss(mine, lambda p: p.chosen)}")
        # The rule for tiles of 8 tokens is another one, and stays.
        narrow = [p for p in decoding if not p.chosen.startswith("8x")]
        for title, some, of, names in (
            ("BY_ROWS", narrow, lambda p: p.rows, few),
            ("BY_TOKENS", prefill, lambda p: p.each, many),
            ("by tokens, of all batches", mine, lambda p: p.each, many),
        ):
            lines = fitted(some, of, names)
            if lines:
                said = loss(some, lambda p, lines=lines, of=of: taken(lines, of(p)))
                out.append(f"  {title} = {lines}: loses {said}")
        ratios = {
            name: [p.ms[name + "+"] / p.ms[name] for p in mine if name + "+" in p.ms]
            for name in sorted({n for p in mine for n in p.dealt})
        }
        for name, values in ratios.items():
            if values:
                mean = statistics.geometric_mean(values)
                out.append(
                    f"  {name} by a counter: {100 * mean - 100:+.2f} % in the mean, "
                    f"{100 * min(values) - 100:+.1f} to {100 * max(values) - 100:+.1f} %"
                )
        for what in ("shared", "held"):
            beside = [
                p.beside[f"{n}+ {what}"] / p.beside[f"{n} {what}"]
                for p in mine
                for n in p.dealt
                if f"{n}+ {what}" in p.beside
            ]
            if beside:
                mean = statistics.geometric_mean(beside)
                out.append(
                    f"  beside {what}, by a counter: {100 * mean - 100:+.2f} % in the mean, "
                    f"{100 * min(beside) - 100:+.1f} to {100 * max(beside) - 100:+.1f} %"
                )
    return "\n".join(out)
