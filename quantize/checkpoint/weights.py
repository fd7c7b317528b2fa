"""Where the bytes of a checkpoint's safetensors files come from: by default from its folder.

A :class:`Checkpoint` asks for nothing else of them. So one whose weights are on the hub is planned,
and even quantized, by the same code (``hub_weights``, ``streamed``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from quantize.checkpoint.headers import read_header
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError


class Weights:
    """Files on this machine, each under its own path."""

    here = True
    """Whether tensors can be read at any time and in any order."""

    @property
    def names(self) -> Collection[str] | None:
        """Names of the files that are there; None: those in the checkpoint's folder."""
        return None

    def header(self, file: Path) -> list[TensorInfo]:
        """The tensors of ``file``; raises what ``read_header`` does."""
        return read_header(file)

    def open(self, file: Path) -> int:
        """A descriptor to read ``file`` with; the caller closes it.

        Raises:
            QuantizeError: if it cannot be read.
        """
        try:
            return os.open(file, os.O_RDONLY)
        except OSError as error:
            raise QuantizeError(f"{file}: {error.strerror or error}") from error

    def is_here(self, file: Path) -> bool:
        """Whether :meth:`open` returns at once."""
        return True

    def times(self, files: Iterable[Path]) -> dict[str, int]:
        """When files were changed, in nanoseconds, by their true paths."""
        return {str(file.resolve()): file.stat().st_mtime_ns for file in files}

    def apart(self, file: Path, begin: int, end: int) -> bytes | None:
        """Bytes of a file that is not here any more; None: :meth:`open` has it."""
        return None

    def digest(self, file: Path) -> str:
        """SHA-256 of the file's header, its size and, in the hub's cache, its hash."""
        try:
            with file.open("rb") as stream:
                first = stream.read(8)
                beginning = first + stream.read(int.from_bytes(first, "little"))
                size = os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise QuantizeError(f"{file}: {error.strerror or error}") from error
        blob = file.resolve()
        return header_digest(beginning, size, blob.name if blob.parent.name == "blobs" else "")


def header_digest(beginning: bytes, size: int, known: str) -> str:
    """The digest of a file.

    Args:
        beginning: the file's first bytes, up to the end of its header.
        size: of the file, in bytes.
        known: the hash that the hub knows it by; empty if there is none.
    """
    return hashlib.sha256(f"{known} {size} ".encode() + beginning).hexdigest()
