"""What serving runs measured, as one table, and whether one variant is slower than another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

STATISTICS = ("mean", "median", "p99")
KEPT = (
    "output_throughput",
    "request_throughput",
    *(f"{which}_{what}_ms" for what in ("ttft", "tpot") for which in STATISTICS),
)
"""What is kept of the many numbers in ``vllm bench serve``'s JSON."""

NOISE_LIMIT = 0.05
"""Rounds of one variant that differ by more cannot tell which of two is slower."""


class BenchmarkError(Exception):
    """A run whose figures would mean nothing."""


@dataclass(frozen=True)
class Run:
    """One run of ``vllm bench serve`` against one server."""

    variant: str
    concurrency: int
    round: int
    requests: int
    seconds: float
    metrics: Mapping[str, float]

    @classmethod
    def of(
        cls, variant: str, round_: int, result: Mapping[str, Any], requests: int, output_len: int
    ) -> Run:
        """From ``vllm bench serve``'s result.

        Raises:
            BenchmarkError: if requests failed, or answers were shorter than asked for: either makes
                a server look fast.
        """
        concurrency = int(result["max_concurrency"])
        where = f"{variant}, concurrency {concurrency}, round {round_}"
        done, failed = int(result["completed"]), int(result.get("failed", 0))
        if failed or done != requests:
            raise BenchmarkError(f"{where}: {done} of {requests} requests answered")
        tokens = int(result["total_output_tokens"])
        if tokens != requests * output_len:
            raise BenchmarkError(
                f"{where}: {tokens} tokens generated where {requests} x {output_len} were asked for"
            )
        metrics = {name: float(result[name]) for name in KEPT}
        return cls(variant, concurrency, round_, requests, float(result["duration"]), metrics)

    def line(self) -> dict[str, Any]:
        """For the RESULT line: flat JSON values."""
        values = asdict(self)
        numbers = values.pop("metrics")
        values["seconds"] = round(self.seconds, 3)
        return values | {name: round(value, 3) for name, value in numbers.items()}


def medians(runs: Iterable[Run]) -> dict[tuple[int, str], dict[str, float]]:
    """Of each number over the rounds, by concurrency and variant, in order of appearance."""
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.concurrency, run.variant), []).append(run)
    return {
        key: {name: median(run.metrics[name] for run in group) for name in KEPT}
        for key, group in groups.items()
    }


def spread(runs: Sequence[Run], variant: str, concurrency: int) -> float | None:
    """By how much the variant's output throughput differs over rounds, relative; None for one."""
    found = [
        run.metrics["output_throughput"]
        for run in runs
        if (run.variant, run.concurrency) == (variant, concurrency)
    ]
    return (max(found) - min(found)) / median(found) if len(found) > 1 else None


def table(runs: Sequence[Run]) -> str:
    """Markdown: one row a concurrency and variant, medians over rounds."""
    lines = [
        "| concurrency | variant | output tokens/s | requests/s | TTFT ms, mean / p50 / p99 "
        "| TPOT ms, mean / p50 / p99 | rounds differ by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = sorted(medians(runs).items(), key=lambda item: item[0][0])
    for (concurrency, variant), of in rows:
        ttft, tpot = (
            " / ".join(f"{of[f'{which}_{what}_ms']:.{digits}f}" for which in STATISTICS)
            for what, digits in (("ttft", 1), ("tpot", 2))
        )
        differ = spread(runs, variant, concurrency)
        lines.append(
            f"| {concurrency} | {variant} | {of['output_throughput']:.1f} "
            f"| {of['request_throughput']:.2f} | {ttft} | {tpot} "
            f"| {'' if differ is None else f'{differ:.1%}'} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """Whether ``ours`` is slower than ``theirs`` at one concurrency.

    ``ratio`` is of output throughputs, above 1 where ours is faster; ``noise`` is the larger of the
    two variants' differences between rounds, None after one round.
    """

    concurrency: int
    ours: str
    theirs: str
    ratio: float
    ttft: float
    tpot: float
    noise: float | None

    @property
    def word(self) -> str:
        """``not slower``; ``within noise`` or ``slower``; ``undecided`` where noise is too high."""
        if self.ratio >= 1:
            return "not slower"
        if self.noise is None or self.noise > NOISE_LIMIT:
            return "undecided"
        return "within noise" if 1 - self.ratio <= self.noise else "slower"

    def __str__(self) -> str:
        noise = "one round" if self.noise is None else f"rounds differ by {self.noise:.1%}"
        return (
            f"concurrency {self.concurrency}: {self.ours}/{self.theirs} output tokens/s "
            f"{self.ratio:.3f}, mean TTFT {self.ttft:.3f}, mean TPOT {self.tpot:.3f} ({noise}): "
            f"{self.word}"
        )


def verdicts(runs: Sequence[Run], ours: str, theirs: str) -> list[Verdict]:
    """One for each concurrency at which both were measured."""
    of = medians(runs)
    found = []
    for concurrency in sorted({run.concurrency for run in runs}):
        if (concurrency, ours) not in of or (concurrency, theirs) not in of:
            continue
        mine, other = of[concurrency, ours], of[concurrency, theirs]
        spreads = [spread(runs, variant, concurrency) for variant in (ours, theirs)]
        ratio, ttft, tpot = (
            mine[name] / other[name]
            for name in ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
        )
        known = [value for value in spreads if value is not None]
        noise = max(known) if len(known) == 2 else None
        found.append(Verdict(concurrency, ours, theirs, ratio, ttft, tpot, noise))
    return found
