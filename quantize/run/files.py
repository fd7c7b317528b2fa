"""Writing files that are either whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write; it becomes ``path`` in one step, once all of it is on the disk.

    Whatever ``path`` was, a symbolic link too, is replaced and not written to.

    Args:
        partial: as for :class:`ShardWriter`.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Bring a file's data, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object, partial: Path | None = None) -> None:
    """Write ``value`` to ``path``, as :func:`replacing` does."""
    encoded = (json.dumps(value, indent=2) + "\n").encode()
    with replacing(path, partial) as file:
        file.write(encoded)
