"""What the commands print: tables, JSON and complaints.

Results go to standard output, everything else to standard error; and all of it to the log, if
there is one (``--log-file``). With ``--quiet`` only complaints are printed, and what was asked for
by name: JSON, figures.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.markup import escape
from rich.table import Table

from quantize.cli import signals
from quantize.cli.log import Log


class Said(Console):
    """A console whose lines go to the log too."""

    log_file: Log | None = None
    """The log of all of them."""

    def print(self, *what: Any, **how: Any) -> None:
        """See ``rich.console.Console``."""
        if Said.log_file is not None and not isinstance(what[0] if what else Control(), Control):
            Said.log_file.print(*what, **how)
        super().print(*what, **how)


out = Said()
err = Said(stderr=True)


@contextmanager
def speaking(
    quiet: bool = False, log_file: Path | None = None, apart: Iterable[Path] = ()
) -> Iterator[None]:
    """Within, things are said as ``--quiet`` and ``--log-file`` ask.

    Args:
        apart: folders that the log may not be in.

    Raises:
        QuantizeError: if the log cannot be written.
    """
    log = Log(log_file, apart) if log_file is not None else None
    try:
        Said.log_file = log
        signals.log = log.write if log is not None else None
        out.quiet = err.quiet = quiet
        with _hubs_client(quiet):
            yield
    finally:
        Said.log_file = signals.log = None
        out.quiet = err.quiet = False
        if log is not None:
            log.close()
            if log.failed:
                complain("warning", f"--log-file {log_file}: {log.failed}; it lacks some lines")


@contextmanager
def _hubs_client(quiet: bool) -> Iterator[None]:
    """Within, if ``quiet``, huggingface_hub does not tell of each time that it tries again. Its log
    has a level from when it is imported, which may be before or within."""
    name, logger = "HF_HUB_VERBOSITY", logging.getLogger("huggingface_hub")
    # It goes on then, and what it fails of says which disk it is.
    warnings.filterwarnings("ignore", "Not enough free disk space", UserWarning)
    asked, level = os.environ.get(name), logger.level
    if not quiet or asked is not None:
        yield
        return
    os.environ[name] = "error"
    if level:  # imported already
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        del os.environ[name]
        if logger.level:
            logger.setLevel(level or logging.WARNING)


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
    quiet, err.quiet = err.quiet, False
    err.print(f"[red]{kind}:[/]", plain(text), soft_wrap=True, highlight=False)
    err.quiet = quiet


def print_json(value: object) -> None:
    """Print ``value`` as JSON, without rich, which would wrap and colour it."""
    text = json.dumps(value, indent=2)
    if Said.log_file is not None:
        Said.log_file.write(text)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def table(title: str, first: str, *others: str) -> Table:
    """A table with names in the first column and figures in the others; nothing is cut off."""
    made = Table(title=plain(title))
    made.add_column(first, overflow="fold")
    for name in others:
        made.add_column(name, justify="right", overflow="fold")
    return made
