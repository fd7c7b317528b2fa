"""How far a command has come: bars on a terminal; elsewhere, and in the log, a line a minute.

Bars and lines go to standard error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Event, Lock, Thread

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from quantize.cli.output import Said, err, plain
from quantize.duration import duration, speed

EVERY = 60.0
"""Seconds between two lines."""

ENOUGH_SECONDS, ENOUGH_SHARE = 10.0, 0.01
"""From how much of a phase its speed and its end are foretold: what the first few bytes took is how
long it takes to begin, and a hundred thousand times that is hours."""

Clock = Callable[[], float]
Count = Callable[[], int]
"""Gives a number of bytes that grows."""

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
        read: of steps, how many bytes were read until now, for this work or before it.
    """

    what: str
    total: float
    clock: Clock
    steps: bool = False
    done: float = 0
    where: str = ""
    read: Count = lambda: 0
    _began: tuple[float, float, int] | None = None

    def update(self, done: float, where: str = "") -> None:
        """Say how much is done. What was done when it began took no time; it begins with the last
        call before anything more is."""
        self.done, self.where = done, where
        if self._began is None or done <= self._began[1]:
            self._began = self.clock(), done, self.read()

    def wait(self) -> None:
        """Say that something else is being done: until now, nothing of this could be."""
        if self._began is not None:
            self._began = self.clock(), self.done, self.read()

    @property
    def pace(self) -> float:
        """Bytes or steps a second since it began; 0 if nothing is done since."""
        if self._began is None or self.done <= self._began[1]:
            return 0.0
        return (self.done - self._began[1]) / self._seconds

    @property
    def _seconds(self) -> float:
        return max(self.clock() - self._began[0], 1e-9) if self._began else 0.0

    @property
    def _nbytes(self) -> int:
        """Of steps: bytes that were read for them."""
        return self.read() - self._began[2] if self._began else 0

    @property
    def _tells(self) -> bool:
        """Whether enough time has gone by to say how fast it is."""
        return self.done >= self.total or self._seconds >= ENOUGH_SECONDS

    @property
    def left(self) -> str:
        """How long it still takes, at the pace that it has had so far; nothing until enough is done
        to know."""
        if self._began is None or not self._tells or not self.pace or self.done >= self.total:
            return ""
        before = self._began[1]
        if self.done - before < ENOUGH_SHARE * (self.total - before):
            return ""
        return f"{duration((self.total - self.done) / self.pace)} left"

    @property
    def amount(self) -> str:
        """Where it is, and how much is done."""
        if self.steps:
            much = f"{decimal(self._nbytes)} read" if self._nbytes else ""
        else:
            much = f"{decimal(int(self.done))} of {decimal(int(self.total))}"
        return ", ".join(filter(None, (self.where, much)))

    @property
    def speed(self) -> str:
        """Of bytes; nothing until enough time has gone by to know."""
        pace = self.pace
        if self.steps:
            pace = self._nbytes / self._seconds if self._nbytes else 0.0
        return speed(pace) if pace and self._tells else ""

    def __str__(self) -> str:
        percent = f"{100 * self.done / self.total if self.total else 100:.0f}%"
        parts = filter(None, (self.amount, percent, self.speed, self.left))
        return f"{self.what}: {', '.join(parts)}"


class Shown:
    """Work in lines: of the latest, one when it begins, one every minute, and one at the end.

    Args:
        say: prints a line; by default to standard error, and to the log.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._latest: Work | None = None
        self._say = say

    def update(self, work: Work) -> None:
        """Show that the work has gone on."""
        began, self._latest = self._latest is not work, work
        if began:
            self.print()

    def say(self, line: str) -> None:
        """Print a line."""
        if self._say is not None:
            self._say(line)
        else:
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
    """Work in bars, one below the other.

    Args:
        lines: the same in lines, for the log.
    """

    def __init__(self, bars: Progress, lines: Shown | None = None) -> None:
        super().__init__()
        self._bars = bars
        self._lines = lines
        self._tasks: dict[int, TaskID] = {}

    def update(self, work: Work) -> None:
        """See :class:`Shown`."""
        if self._lines is not None:
            self._lines.update(work)
        if id(work) not in self._tasks:
            self._tasks[id(work)] = self._bars.add_task(plain(work.what), about="")
        about = ", ".join(filter(None, (work.amount, work.speed, work.left)))
        task = self._tasks[id(work)]
        self._bars.update(task, completed=work.done, total=work.total, about=plain(about))


class Bar:
    """A command's progress: some bytes, and passes through a model beside them.

    Args:
        total: bytes; None if there are only passes.
        read: how many bytes have been read until now, by passes and whatever else.
    """

    def __init__(
        self,
        shown: Shown,
        what: str,
        total: int | None = None,
        clock: Clock = time.monotonic,
        read: Count = lambda: 0,
    ) -> None:
        self._shown, self._clock, self._read = shown, clock, read
        self._lock = Lock()  # several threads advance
        self._passes: dict[str, Work] = {}
        self._bytes = Work(what, total or 0, clock)

    def advance(self, nbytes: int, where: str = "") -> None:
        """Say that so many bytes more are done, and where they are from; 0 as the work begins."""
        with self._lock:
            self._bytes.update(self._bytes.done + nbytes, where)
        self._shown.update(self._bytes)

    def say(self, line: str) -> None:
        """Print a line beside the progress."""
        self._shown.say(line)

    def passing(self, what: str, done: float, steps: int, where: str = "") -> None:
        """Say how many of the steps of a pass are done, and where it is."""
        new = Work(what, steps, self._clock, steps=True, read=self._read)
        work = self._passes.setdefault(what, new)
        work.total = steps
        work.update(done, where)
        # Hours of passes come after the first bytes are counted (those of an earlier run) and
        # before all others, which take minutes.
        self._bytes.wait()
        self._shown.update(work)

    def calibrating(self, done: float, steps: int, where: str) -> None:
        """See ``quantize.calibration.progress.Progress``."""
        self.passing("Calibrating", done, steps, where)

    def measuring(self, done: float, steps: int, where: str) -> None:
        """Likewise, of the passes before it that measure layers' losses."""
        self.passing("Measuring losses", done, steps, where)

    def evaluating(self, done: float, steps: int, where: str) -> None:
        """Likewise, of both models."""
        self.passing("Evaluating", done, steps, where)

    def counting(self, done: float, steps: int, where: str) -> None:
        """Likewise, of the pass before it that counts tokens."""
        self.passing("Counting tokens", done, steps, where)


@contextmanager
def progress_bar(what: str, total: int | None = None, read: Count = lambda: 0) -> Iterator[Bar]:
    """Show how much is done of ``total`` bytes, until the context ends; see :class:`Bar`."""
    with ExitStack() as stack:
        shown: Shown
        if err.is_terminal and not err.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[about]}"),
            )
            bars = stack.enter_context(Progress(*columns, console=err))
            log = Said.log_file
            lines = stack.enter_context(_every_minute(Shown(log.write))) if log else None
            shown = ShownAsBars(bars, lines)
        else:
            shown = stack.enter_context(_every_minute(Shown()))
        yield Bar(shown, what, total, read=read)


@contextmanager
def downloading(nbytes: int) -> Iterator[Callable[[int], None]]:
    """Show how much of a download has come; see ``quantize.checkpoint.coming.Shown``."""
    with progress_bar("Downloading", nbytes) as bar:
        bar.advance(0)
        yield bar.advance


@contextmanager
def uploading(nbytes: int) -> Iterator[Callable[[int], None]]:
    """Likewise of an upload; on a terminal the hub's client does, and the log has lines."""
    from quantize.checkpoint.hub import without_bars

    if err.is_terminal and not err.quiet:
        if Said.log_file is None:
            yield lambda _: None
            return
        with _every_minute(Shown(Said.log_file.write)) as shown:
            line = Bar(shown, "Uploading", nbytes)
            line.advance(0)
            yield line.advance
        return
    with without_bars(), progress_bar("Uploading", nbytes) as bar:
        bar.advance(0)
        yield bar.advance


@contextmanager
def _every_minute(shown: Shown) -> Iterator[Shown]:
    """Print it, until the context ends."""
    ended = Event()
    thread = Thread(target=shown.print_until, args=(ended.wait,), daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        ended.set()
        thread.join()
