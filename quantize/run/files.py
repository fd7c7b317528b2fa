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
    """A file to write. It becomes ``path`` in one step, when all of it is on the disk.

    Whatever ``path`` was before is replaced and never written to, a symbolic link too.

    Args:
        partial: what the file is called until then, in the same file system; by default a hidden
            file beside ``path``.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # a new file, and never where a link leads
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
    """Flush a file's data, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: object) -> bytes:
    """``value`` as :func:`write_json` writes it."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: object, partial: Path | None = None) -> None:
    """Write ``value`` to ``path`` as JSON, whole or not at all; see :func:`replacing`."""
    with replacing(path, partial) as file:
        file.write(json_bytes(value))
