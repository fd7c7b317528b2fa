"""Tensors of all calibration tokens, in files that are mapped into memory.

The operating system keeps in memory what fits there and writes the rest to disk, so nothing here
decides what stays in memory.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from quantize.checkpoint.tensors import DTYPE_NAMES
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.run.files import write_json

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_INDEX = "index.json"


class Store:
    """Tensors in the files of one folder, with an index of their shapes.

    Args:
        folder: is made if it is not there; its disk needs room for what is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        index = folder / _INDEX
        self._index: dict[str, Any] = json.loads(index.read_text()) if index.exists() else {}

    def new(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor of zeros in a new file ``name``, in place of one that is there.

        Raises:
            QuantizeError: if the disk has no room for it.
        """
        self.remove(name)
        size = max(1, math.prod(shape)) * dtype.itemsize
        # All of it at once: a mapped file that finds no room later kills the process.
        file = self.folder / name
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise QuantizeError(
                f"{file}: calibration needs {decimal(size)} here ({error.strerror}); free some "
                "space or take fewer rows"
            ) from error
        finally:
            os.close(descriptor)
        self._index[name] = [list(shape), DTYPE_NAMES[dtype]]
        write_json(self.folder / _INDEX, self._index)
        return self.open(name)

    def open(self, name: str) -> torch.Tensor:
        """Map the tensor in the file ``name``; writing to it changes the file.

        Raises:
            QuantizeError: if the file is missing, or has another size than it should.
        """
        if not self.is_whole(name):
            raise QuantizeError(
                f"{self.folder / name} is missing or damaged; start again with --overwrite"
            )
        shape, dtype = self._index[name]
        size = math.prod(shape)
        flat = torch.from_file(
            str(self.folder / name), shared=True, size=max(1, size), dtype=_DTYPES[dtype]
        )
        return flat[:size].view(shape)

    def is_whole(self, name: str) -> bool:
        """Whether the file ``name`` has the size that the index says."""
        shape, dtype = self._index.get(name, (None, None))
        if shape is None:
            return False
        try:
            found = (self.folder / name).stat().st_size
        except OSError:
            return False
        return bool(found == max(1, math.prod(shape)) * _DTYPES[dtype].itemsize)

    def names(self, prefix: str) -> list[str]:
        """Return the names that begin with ``prefix`` and a dot, in order."""
        return sorted(name for name in self._index if name.startswith(f"{prefix}."))

    def open_all(self, prefix: str) -> list[torch.Tensor]:
        """Open each of :meth:`names`."""
        return [self.open(name) for name in self.names(prefix)]

    def remove(self, name: str) -> None:
        """Remove the file ``name``, if it is there."""
        (self.folder / name).unlink(missing_ok=True)
        if self._index.pop(name, None) is not None:
            write_json(self.folder / _INDEX, self._index)

    def remove_all(self, prefix: str) -> None:
        """Remove each of :meth:`names`."""
        for name in self.names(prefix):
            self.remove(name)

    def remove_all_but(self, prefixes: list[str]) -> None:
        """Remove every tensor whose name does not begin with one of ``prefixes`` and a dot."""
        kept = {name for prefix in prefixes for name in self.names(prefix)}
        for name in set(self._index) - kept:
            self.remove(name)


def states_name(layer: int) -> str:
    """Return the prefix of the files of a layer's inputs."""
    return f"states-{layer:05d}"


def gradients_name(layer: int) -> str:
    """Return the prefix of the files of the loss's gradients with respect to a layer's inputs."""
    return f"gradients-{layer:05d}"


def experts_output_name(layer: int, group: ExpertGroup) -> str:
    """Return the file of what a layer's experts return."""
    return f"experts-output-{layer:05d}-{group.first}"


def routed_names(layer: int, group: ExpertGroup) -> tuple[str, str, str, str]:
    """Return the files of what a layer's experts are given: hidden states, expert numbers and the
    router's weights; and of the loss's gradient with respect to what they return.

    No other experts' have the same names: on another machine an old file may still seem to be
    there.
    """
    where = f"{layer:05d}-{group.first}"
    return f"x-{where}", f"ids-{where}", f"weights-{where}", f"grad-output-{where}"
