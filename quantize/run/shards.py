"""Writing safetensors shards as a stream.

The library's own writer needs a whole shard in memory. Here the names, dtypes and shapes of all
tensors are known before their data, and so is each tensor's place in the file. Tensors can
therefore be written in any order and from any thread, and memory holds one at a time. A shard gets
its real name only when all of it is on the disk.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header
padded with spaces to 8 bytes, data).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch

from quantize.checkpoint.disk import told
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError


def header(outputs: Sequence[TensorInfo]) -> bytes:
    """What a shard that holds ``outputs`` in that order begins with: all but their data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for out in outputs:
        end = start + out.nbytes
        entries[out.name] = {
            "dtype": out.dtype,
            "shape": list(out.shape),
            "data_offsets": [start, end],
        }
        start = end
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def is_complete(path: Path, outputs: Sequence[TensorInfo]) -> bool:
    """Whether ``path`` is a shard of just these ``outputs``, going by its header and size."""
    expected = header(outputs)
    try:
        with path.open("rb") as file:
            found = file.read(len(expected))
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    return found == expected and size == len(expected) + sum(out.nbytes for out in outputs)


class ShardWriter:
    """Writes ``outputs`` to ``path``. Until :meth:`finish`, the file is called ``partial``.

    As a context manager, it finishes the shard, or removes it if there was an error.

    Args:
        partial: in the same file system as ``path``; by default hidden beside it.
        kept: a partial file of these ``outputs`` that is there is gone on with, and one that is not
            finished stays.

    Raises:
        QuantizeError: naming the file, if it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        outputs: Sequence[TensorInfo],
        partial: Path | None = None,
        kept: bool = False,
    ) -> None:
        self.path = path
        self._partial = partial or path.with_name(f".{path.name}.partial")
        self._kept = kept
        self._outputs = {out.name: out for out in outputs}
        self._offsets: dict[str, int] = {}
        first = header(outputs)
        position = len(first)
        for out in outputs:
            self._offsets[out.name] = position
            position += out.nbytes
        self._missing = position
        self._lock = Lock()
        self._goes_on = kept and is_complete(self._partial, outputs)
        try:
            if self._goes_on:
                self._file = os.open(self._partial, os.O_WRONLY | os.O_NOFOLLOW)
                self._missing -= len(first)
                return
            self._partial.unlink(missing_ok=True)
            # A new file, and never where a link leads.
            self._file = os.open(self._partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except OSError as error:
            raise QuantizeError(f"{self._partial}: {told(error)}") from error
        try:
            self._write(first, 0)
            if kept:
                os.ftruncate(self._file, position)
        except BaseException:
            self._kept = False
            self.abort()
            raise

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write the tensor ``name``, of the dtype and shape announced for it, or a part of it.

        Several threads may call this at once.

        Args:
            tensor: the data; of a part, contiguous bytes.
            start: where the part begins, in bytes.
        """
        out = self._outputs[name]
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        if start + data.nbytes > out.nbytes:
            raise AssertionError(f"{name}: {data.nbytes} bytes at {start}, announced {out}")
        self._write(data.data, self._offsets[name] + start)

    def there(self, name: str) -> None:
        """Say that the tensor ``name`` was in the partial file already, in place of writing it."""
        assert self._goes_on
        with self._lock:
            self._missing -= self._outputs[name].nbytes

    def pause(self) -> None:
        """Flush what was written to the disk, and leave the partial file to another writer."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise QuantizeError(f"{self._partial}: {told(error)}") from error
        finally:
            os.close(self._file)

    def finish(self) -> None:
        """Flush everything to the disk, then give the file its name in one step."""
        if self._missing:
            raise AssertionError(f"{self.path}: {self._missing} bytes were never written")
        try:
            os.fsync(self._file)
            self._partial.replace(self.path)
        except OSError as error:
            if self._kept and is_complete(self.path, list(self._outputs.values())):
                return  # another machine was faster with the same
            if not self._kept:
                self._partial.unlink(missing_ok=True)
            raise QuantizeError(f"{self.path}: {told(error)}") from error
        finally:
            os.close(self._file)

    def abort(self) -> None:
        """Remove the unfinished file, unless it is kept."""
        os.close(self._file)
        self._file = -1  # a thread that still writes must not meet another file of that number
        if not self._kept:
            self._partial.unlink(missing_ok=True)

    def _write(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data)
        done = 0
        try:
            while done < view.nbytes:
                done += os.pwrite(self._file, view[done:], position + done)
        except OSError as error:
            raise QuantizeError(f"{self.path}: {told(error)}") from error
        with self._lock:
            self._missing -= done

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()
