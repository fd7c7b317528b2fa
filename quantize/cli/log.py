"""``--log-file``: everything that a command says, each line with its time."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from quantize.errors import QuantizeError

_LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")
"""What each line begins with."""

_WIDTH = 200
"""Columns of tables."""


class Log:
    """A log that is open; what is there already stays before it.

    Args:
        file: must be a log of this package, or not be there.
        apart: folders that it may not be in.

    Attributes:
        failed: how writing to it failed, once it has: the command goes on without.

    Raises:
        QuantizeError: if it is something else, in one of these folders, or cannot be written.
    """

    def __init__(self, file: Path, apart: Iterable[Path] = ()) -> None:
        self.failed = ""
        for folder in apart:
            if file.resolve().is_relative_to(folder.resolve()):
                raise QuantizeError(
                    f"--log-file {file} is in {folder}, which holds a checkpoint; choose another "
                    "folder"
                )
        try:
            # What is neither a log nor empty is somebody's, and must not be added to.
            self._descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
            begins = os.pread(self._descriptor, 32, 0) if regular else b""
        except OSError as error:
            raise QuantizeError(
                f"--log-file {file}: {error.strerror or error}; give a file that you can write to"
            ) from error
        if begins and not _LINE.match(begins):
            self.close()
            raise QuantizeError(f"--log-file {file} is not a log of nvfp4-moe; choose another file")

    def write(self, text: str) -> None:
        """Write lines of text; threads may call this at once."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        lines = "".join(f"{now} {line.rstrip()}\n" for line in text.splitlines() if line.strip())
        try:
            os.write(self._descriptor, lines.encode(errors="backslashreplace"))
        except OSError as error:
            self.failed = self.failed or error.strerror or str(error)

    def print(self, *what: Any, **how: Any) -> None:
        """Write what a console would print, without colours."""
        found = io.StringIO()
        Console(file=found, width=_WIDTH, color_system=None).print(*what, **how)
        self.write(found.getvalue())

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            os.close(self._descriptor)
