"""How far a command has come: bars on a terminal, elsewhere a line a minute.

Both go to standard error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock, Thread

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from quantize.cli.output import err, plain
from quantize.duration import duration

EVERY = 60.0
"""Seconds between two lines."""

Clock = Callable[[], float]
Wait = Callable[[float], bool]
"""Waits for so many seconds; returns whether there is nothing more to wait for."""


@dataclass
class Work:
    """Something that is being done: so many bytes, or so many steps.

    Attributes:
        what: what is done.
        total: bytes or steps.
        clock: gives the time in seconds.
        steps: it is counted in steps, not in bytes.
        done: bytes or steps.
        where: which part of it is being done.
    """

    what: str
    total: float
    clock: Clock
    steps: bool = False
    done: float = 0
    where: str = ""
    _began: tuple[float, float] | None = None

    def update(self, done: float, where: str = "") -> None:
        """Say how much is done. What the first call says was done before, and took no time."""
        self.done, self.where = done, where
        self._began = self._began or (self.clock(), done)

    @property
    def pace(self) -> float:
        """Bytes or steps a second since it began; 0 if that is not known yet."""
        if self._began is None or self.done <= self._began[1]:
            return 0.0
        return (self.done - self._began[1]) / max(self.clock() - self._began[0], 1e-9)

    @property
    def left(self) -> str:
        """How long it still takes, at the pace that it has had so far."""
        if self.done >= self.total:
            return ""
        return f"{duration((self.total - self.done) / self.pace)} left" if self.pace else ""

    @property
    def amount(self) -> str:
        """How much is done, and where it is."""
        if self.steps:
            return self.where
        return f"{decimal(int(self.done))} of {decimal(int(self.total))}"

    @property
    def speed(self) -> str:
        """Of bytes."""
        return f"{self.pace / 1e9:.2f} GB/s" if self.pace and not self.steps else ""

    def __str__(self) -> str:
        percent = f"{100 * self.done / self.total if self.total else 100:.0f}%"
        parts = filter(None, (self.amount, percent, self.speed, self.left))
        return f"{self.what}: {', '.join(parts)}"


class Shown:
    """Work in lines: of the latest, one when it begins, one every minute, and one at the end."""

    def __init__(self) -> None:
        self._latest: Work | None = None

    def update(self, work: Work) -> None:
        """Show that the work has gone on."""
        began, self._latest = self._latest is not work, work
        if began:
            self.print()

    def say(self, line: str) -> None:
        """Print a line beside the progress."""
        err.print(plain(line), highlight=False, soft_wrap=True)

    def print(self) -> None:
        """Print how far the latest work is, if there is any."""
        if self._latest is not None:
            self.say(str(self._latest))

    def print_until(self, wait: Wait) -> None:
        """Print that every minute, until there is nothing more to wait for; then once more."""
        while not wait(EVERY):
            self.print()
        self.print()


class ShownAsBars(Shown):
    """Work in bars, one below the other."""

    def __init__(self, bars: Progress) -> None:
        super().__init__()
        self._bars = bars
        self._tasks: dict[int, TaskID] = {}

    def update(self, work: Work) -> None:
        """See :class:`Shown`."""
        if id(work) not in self._tasks:
            self._tasks[id(work)] = self._bars.add_task(plain(work.what), about="")
        about = ", ".join(filter(None, (work.amount, work.speed, work.left)))
        task = self._tasks[id(work)]
        self._bars.update(task, completed=work.done, total=work.total, about=plain(about))


class Bar:
    """A command's progress: some bytes, and passes through a model beside them.

    Args:
        total: bytes; None if there are only passes.
    """

    def __init__(
        self, shown: Shown, what: str, total: int | None = None, clock: Clock = time.monotonic
    ) -> None:
        self._shown, self._clock = shown, clock
        self._lock = Lock()  # several threads advance
        self._passes: dict[str, Work] = {}
        self._bytes = Work(what, total or 0, clock)
        if total is not None:
            self._shown.update(self._bytes)

    def advance(self, nbytes: int) -> None:
        """Say that so many bytes more are done."""
        with self._lock:
            self._bytes.update(self._bytes.done + nbytes)
        self._shown.update(self._bytes)

    def say(self, line: str) -> None:
        """Print a line beside the progress."""
        self._shown.say(line)

    def passing(self, what: str, done: float, steps: int, where: str = "") -> None:
        """Say how many of the steps of a pass are done, and where it is."""
        work = self._passes.setdefault(what, Work(what, steps, self._clock, steps=True))
        work.total = steps
        work.update(done, where)
        self._shown.update(work)

    def calibrating(self, done: float, steps: int, where: str) -> None:
        """See ``quantize.calibration.progress.Progress``."""
        self.passing("Calibrating", done, steps, where)

    def measuring(self, done: float, steps: int, where: str) -> None:
        """Likewise, of the passes before it that measure layers' losses."""
        self.passing("Measuring losses", done, steps, where)

    def counting(self, done: float, steps: int, where: str) -> None:
        """Likewise, of the pass before it that counts tokens."""
        self.passing("Counting tokens", done, steps, where)


@contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Bar]:
    """Show how much is done of ``total`` bytes, until the context ends."""
    if err.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[about]}"),
        )
        with Progress(*columns, console=err) as bars:
            yield Bar(ShownAsBars(bars), what, total)
        return
    shown, ended = Shown(), Event()
    thread = Thread(target=shown.print_until, args=(ended.wait,), daemon=True)
    thread.start()
    try:
        yield Bar(shown, what, total)
    finally:
        ended.set()
        thread.join()
