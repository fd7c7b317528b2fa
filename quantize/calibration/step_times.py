"""How much of a calibration a step is: layers that round take hours, and others seconds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from quantize.calibration.progress import Progress

Steps = tuple[tuple[float, ...], ...]
"""What each step takes, in any unit: its parts, of which each is as much of the step as any other
to those that tell how far it is."""


def by_time(progress: Progress, steps: Steps) -> Progress:
    """Return what tells ``progress`` of steps by the time that they take.

    On the way forward, ``two-sided`` does half of its steps in a fiftieth of its time, and what is
    left follows from how many are done.

    Args:
        progress: is told as many steps as there are, of which each is as long as any other.
        steps: a pass of another number of steps is told of as it is.
    """
    ends = [0.0, *accumulate(map(sum, steps))]

    def report(done: float, count: int, where: str) -> None:
        if count == len(steps) and ends[-1] > 0:
            whole = min(int(done), count - 1)
            done = count * (ends[whole] + _begun(steps[whole], done - whole)) / ends[-1]
        progress(done, count, where)

    return report


def _begun(parts: Sequence[float], share: float) -> float:
    """What a share of a step, 0 to 1, has taken."""
    at = share * len(parts)
    whole = min(int(at), len(parts) - 1)
    return sum(parts[:whole]) + (at - whole) * parts[whole]
