"""A checkpoint on disk: its config, and where each tensor lies. Nothing is loaded until asked.

Files are read with ``pread``, not mapped into memory: a file that is cut off, or a disk that fails,
is then an error message instead of the signal that kills a process, and memory holds what was
asked for and no more.
"""

from __future__ import annotations

import hashlib
import math
import os
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from quantize.checkpoint.headers import check_counts, check_index, find_files, read_header
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.memory import Arena
from quantize.checkpoint.sources.find import find_stored_weights
from quantize.checkpoint.sources.refusals import undecodable
from quantize.checkpoint.tensors import BYTES, DTYPES, TensorInfo
from quantize.errors import QuantizeError

_SAMPLES, _SAMPLE = 16, 256
"""Tensors a file of which the middle is looked at to tell checkpoints apart, and bytes of each."""

_MAX_OPEN = 256
"""Files kept open; those beyond are opened for each read, so that no limit is ever met."""


class Checkpoint:
    """A folder of safetensors files with a ``config.json``.

    Use as a context manager: files stay open until it ends. Reading is safe from several threads.

    Args:
        folder: must hold ``config.json`` and ``*.safetensors``, with or without an index.
        decode: whether weights in a known quantized format appear as floats.

    Attributes:
        stored: every tensor in the files.
        tensors: every tensor of the model: those of ``stored``, but with each weight that a known
            format (``quantize.checkpoint.sources``) splits into codes and scales as one tensor,
            ``BF16``.

    Raises:
        QuantizeError: naming the file or tensor that is missing or malformed.
    """

    def __init__(self, folder: Path, decode: bool = True) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self._open: dict[Path, int] = {}
        self._lock = Lock()
        self.files = find_files(folder)
        self.stored: dict[str, TensorInfo] = {}
        for file in self.files:
            for info in read_header(file):
                if info.name in self.stored:
                    other = self.stored[info.name].file.name
                    raise QuantizeError(f"{info.name} is in both {other} and {file.name}")
                self.stored[info.name] = info
        check_index(folder, self.stored)
        check_counts(folder / "config.json", self.config, len(self.stored))
        self._stored_weights = find_stored_weights(self.stored, self.config) if decode else {}
        self.tensors = self._decoded_view()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(t.nbytes for t in self.stored.values())

    @property
    def formats(self) -> set[str]:
        """Names of the quantized formats that some tensors are stored in."""
        decoded = {weight.format for weight in self._stored_weights.values()}
        return decoded | undecodable(self.stored)

    def parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors that ``tensors[name]`` consists of: mostly just itself."""
        weight = self._stored_weights.get(name)
        return weight.parts if weight else (name,)

    def stored_bytes(self, name: str) -> int:
        """Bytes in the files of ``tensors[name]``."""
        return sum(self.stored[part].nbytes for part in self.parts(name))

    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: nested in a multimodal one."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def load(
        self, name: str, arena: Arena | None = None, device: torch.device | None = None
    ) -> torch.Tensor:
        """One whole tensor: as stored, or dequantized to float32.

        Args:
            arena: where memory for what is read comes from; else it is new.
            device: where the tensor goes, and where it is dequantized.
        """
        return self._load(name, None, arena, device)

    def load_expert(
        self,
        name: str,
        expert: int,
        experts: int | None = None,
        arena: Arena | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """``tensor[expert]`` of a stacked tensor, without reading the rest of it.

        Args:
            experts: how many lie one after another in the first dimension, where they have none of
                their own.
        """
        if experts and name in self._stored_weights:  # block scales need not end where experts do
            return self._load(name, None, arena, device).unflatten(0, (experts, -1))[expert]
        return self._load(name, (expert, experts), arena, device)

    def read_into(self, buffer: torch.Tensor, info: TensorInfo, start: int = 0) -> None:
        """Fill ``buffer`` (uint8) with the data of ``info`` from byte ``start`` on.

        Raises:
            QuantizeError: if the file cannot be read, or ends early.
        """
        view = memoryview(buffer.numpy().data)
        done = 0
        descriptor, keep = self._descriptor(info.file)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], info.offset + start + done)
                if count == 0:
                    raise QuantizeError(
                        f"{info.file}: ends within {info.name}; it was cut off while being read"
                    )
                done += count
        except OSError as error:
            raise QuantizeError(
                f"{info.file}: cannot read {info.name}: {error.strerror or error}"
            ) from error
        finally:
            if not keep:
                os.close(descriptor)

    def will_need(self, name: str, expert: int | None = None, experts: int | None = None) -> None:
        """Ask the system to read a tensor (or an expert of it) from disk ahead of time."""
        which = None if expert is None else (expert, experts)
        for info in (self.stored[part] for part in self.parts(name)):
            start, size, _ = _extent(info, which)
            descriptor, keep = self._descriptor(info.file)
            if hasattr(os, "posix_fadvise"):
                with suppress(OSError):  # it is only advice; reading says what is wrong
                    os.posix_fadvise(descriptor, info.offset + start, size, os.POSIX_FADV_WILLNEED)
            if not keep:
                os.close(descriptor)

    def sample(self) -> str:
        """A digest of a little of every file's data: other weights of the same shapes differ."""
        digest = hashlib.sha256()
        tensors: dict[Path, list[TensorInfo]] = {file: [] for file in self.files}
        for info in self.stored.values():
            tensors[info.file].append(info)
        for infos in tensors.values():
            for info in infos[:: -(-len(infos) // _SAMPLES) or 1]:
                buffer = torch.empty(min(_SAMPLE, info.nbytes), dtype=torch.uint8)
                self.read_into(buffer, info, (info.nbytes - len(buffer)) // 2)
                digest.update(buffer.numpy().data)
        return digest.hexdigest()

    def _load(
        self, name: str, expert: _Expert | None, arena: Arena | None, device: torch.device | None
    ) -> torch.Tensor:
        parts = [self._read(self.stored[part], expert, arena) for part in self.parts(name)]
        if device is not None and device.type != "cpu":
            parts = [part.to(device, non_blocking=True) for part in parts]
        weight = self._stored_weights.get(name)
        if weight is None:
            return parts[0]
        out = None
        if arena and parts[0].device.type == "cpu":  # a GPU's allocator reuses memory by itself
            count = math.prod(weight.shape if expert is None else weight.shape[1:])
            out = arena.take(4 * count).view(torch.float32)
        return weight.decode(*parts, out=out)

    def _read(self, info: TensorInfo, expert: _Expert | None, arena: Arena | None) -> torch.Tensor:
        start, size, shape = _extent(info, expert)
        buffer = arena.take(size) if arena else torch.empty(size, dtype=torch.uint8)
        self.read_into(buffer, info, start)
        return buffer.view(DTYPES[info.dtype]).view(shape)

    def _descriptor(self, file: Path) -> tuple[int, bool]:
        """An open file, and whether it stays open."""
        with self._lock:
            descriptor = self._open.get(file)
            if descriptor is not None:
                return descriptor, True
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise QuantizeError(f"{file}: {error.strerror or error}") from error
            if len(self._open) < _MAX_OPEN:
                self._open[file] = descriptor
                return descriptor, True
            return descriptor, False

    def _decoded_view(self) -> dict[str, TensorInfo]:
        view: dict[str, TensorInfo] = {}
        owner = {
            part: name for name, weight in self._stored_weights.items() for part in weight.parts
        }
        for name, info in self.stored.items():
            logical = owner.get(name)
            if logical is None:
                view[name] = info
            elif logical not in view:
                shape = self._stored_weights[logical].shape
                view[logical] = TensorInfo(logical, "BF16", shape, info.file)
        return view


_Expert = tuple[int, int | None]
"""An expert's number, and how many lie one after another without a dimension of their own."""


def _extent(info: TensorInfo, expert: _Expert | None) -> tuple[int, int, tuple[int, ...]]:
    """Where in a tensor's data an expert's begins, its size, both in bytes, and its shape."""
    if expert is None:
        return 0, info.nbytes, info.shape
    number, count = expert
    shape = (info.shape[0] // count, *info.shape[1:]) if count else info.shape[1:]
    size = math.prod(shape) * BYTES[info.dtype]
    return number * size, size, shape
