"""Writing safetensors shards as a stream.

The library's own writer wants a whole shard in memory. Here names, dtypes and shapes are known
before any data is, so the header goes first and each tensor follows as it is made: memory holds one
tensor, not one shard. A shard has its real name only once it is complete.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header
padded with spaces to 8 bytes, data).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from quantize.checkpoint import BYTES
from quantize.errors import QuantizeError

DTYPES = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
"""safetensors' names of the dtypes that NVFP4 layouts consist of."""


class Output(NamedTuple):
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


class ShardWriter:
    """Writes ``outputs``, in that order, to ``path``.

    As a context manager: on leaving without an error, the complete file gets its name in one step;
    on an error, the partial file is removed.
    """

    def __init__(self, path: Path, outputs: list[Output]) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._expected = iter(outputs)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for out in outputs:
            end = start + out.nbytes
            header[out.name] = {
                "dtype": out.dtype,
                "shape": list(out.shape),
                "data_offsets": [start, end],
            }
            start = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file = self._partial.open("wb")
        try:
            self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor: contiguous, of the dtype and shape announced."""
        out = next(self._expected)
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        if out.name != name or data.nbytes != out.nbytes:
            raise AssertionError(f"{name}: {data.nbytes} bytes, announced {out}")
        self._file.write(data.data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)  # gone already if it got its name


def write_json(path: Path, value: object) -> None:
    """Write ``value`` to ``path`` in one step: readers see the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def parse_size(text: str) -> int:
    """Bytes in ``5GB``, ``500 MB``, ``2GiB`` or a plain number.

    Raises:
        QuantizeError: if ``text`` is none of these, or not positive.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbIiKkMmGgTt ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        raise QuantizeError(f"{text!r} is not a size such as 5GB or 500MB") from None
    if size <= 0:
        raise QuantizeError(f"{text!r}: a shard must be larger than nothing")
    return size
