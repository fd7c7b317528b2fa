"""What the commands print: tables, JSON, complaints and progress.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

out = Console()
err = Console(stderr=True)


def plain(text: object) -> str:
    """``text`` as it is, for rich: no markup, and nothing that only a terminal would understand.

    Names come from checkpoints, and anyone can publish one.
    """
    return escape(
        "".join(
            c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
            for c in str(text)
        )
    )


def complain(kind: str, text: str) -> None:
    """Print a line such as ``error: ...`` on standard error; ``text`` may hold anything."""
    err.print(f"[red]{kind}:[/]", plain(text), soft_wrap=True, highlight=False)


def print_json(value: object) -> None:
    """Print ``value`` as JSON, without rich, which would wrap and colour it."""
    print(json.dumps(value, indent=2))


def table(title: str, first: str, *others: str) -> Table:
    """A table with names in the first column and figures in the others; nothing is cut off."""
    made = Table(title=plain(title))
    made.add_column(first, overflow="fold")
    for name in others:
        made.add_column(name, justify="right", overflow="fold")
    return made


class Bar:
    """Progress in bytes, and a second bar for the layers if there is calibration."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress = progress
        self._bytes = progress.add_task(what, total=total)
        self._layers: TaskID | None = None

    def advance(self, nbytes: int) -> None:
        """Say that so many bytes more are done."""
        self._progress.advance(self._bytes, nbytes)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(plain(line), highlight=False, soft_wrap=True)

    def calibrating(self, done: float, layers: int) -> None:
        """Say how many of the layers are calibrated."""
        if self._layers is None:
            self._layers = self._progress.add_task("Calibrating", total=layers, unit="layers")
        self._progress.update(self._layers, completed=done)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Bar]:
    """Show a bar for ``total`` bytes on standard error until the context ends."""
    with Progress(*_columns(), console=err) as progress:
        yield Bar(progress, what, total)


class LayersBar:
    """Progress in layers."""

    def __init__(self, progress: Progress, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=None, unit="layers")

    def layers(self, done: float, total: int) -> None:
        """Say how many of how many steps are done."""
        self._progress.update(self._task, completed=done, total=total)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(plain(line), highlight=False, soft_wrap=True)


@contextmanager
def layers_bar(what: str) -> Iterator[LayersBar]:
    """Show a bar for the steps of a pass through a model on standard error until the context
    ends."""
    with Progress(*_columns(), console=err) as progress:
        yield LayersBar(progress, what)


def _columns() -> Iterator[ProgressColumn]:
    yield TextColumn("{task.description}")
    yield BarColumn()
    yield TaskProgressColumn()
    yield _Speed()
    yield TimeRemainingColumn()


class _Speed(ProgressColumn):
    """Bytes a second, or layers of all layers."""

    def render(self, task: Task) -> Text:
        if task.fields.get("unit") == "layers":
            return Text(f"{task.completed:.1f} of {task.total or 0:.0f} layers")
        speed = task.finished_speed or task.speed or 0
        return Text(f"{speed / 1e9:.2f} GB/s")
