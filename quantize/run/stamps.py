"""What proves that a file is the one that a run wrote or saw: a digest of its size and its ends.

Anyone can write a record that names somebody's files. A record that has their stamps was made by
who had the files. So a run removes what a record names only while the stamps agree.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_EDGE = 2**16
"""Bytes that are read at each end. A safetensors file begins with the names of its tensors."""


def stamp(file: Path) -> str:
    """The stamp of a file; empty if it cannot be read."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(_EDGE)
            stream.seek(max(len(first), size - _EDGE))
            return _digest(size, first, stream.read(_EDGE))
    except OSError:
        return ""


def stamp_of(content: bytes) -> str:
    """The stamp of a file that holds ``content``."""
    first = content[:_EDGE]
    return _digest(len(content), first, content[max(len(first), len(content) - _EDGE) :])


def shard_stamp(file: Path) -> str:
    """The stamp of a shard: of its header alone, which names all its tensors.

    So one that was cut off or damaged since is still the run's. Empty if it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            length = min(int.from_bytes(first, "little"), _EDGE)
            return shard_stamp_of(first + stream.read(length))
    except OSError:
        return ""


def shard_stamp_of(header: bytes) -> str:
    """The stamp of a shard that begins with ``header``, see ``quantize.run.shards.header``."""
    return _digest(0, header[: 8 + _EDGE])


def proven(folder: Path, stamps: Any, of: Callable[[Path], str] = stamp) -> Iterator[str]:
    """Those names of ``stamps`` whose files in ``folder`` have the stamps there, or are empty.

    Args:
        stamps: stamps by name; of a record's JSON, which may be anything.
        of: which kind of stamps they are.
    """
    for name, known in stamps.items() if isinstance(stamps, Mapping) else ():
        file = folder / name
        if known and file.is_file() and (file.stat().st_size == 0 or of(file) == known):
            yield name


def _digest(size: int, *ends: bytes) -> str:
    found = hashlib.sha256(size.to_bytes(8, "little"))
    for end in ends:
        found.update(end)
    return found.hexdigest()
