"""A checkpoint on disk: its config, where each tensor lies, and reading tensors one by one.

Files are read with ``preadv`` and not mapped into memory, for two reasons. If a file is cut off or
a disk fails, a read raises an error with a message, where a mapping would kill the process by a
signal. And memory holds only the tensors that were asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from quantize.checkpoint.bounds import check_counts
from quantize.checkpoint.headers import check_index, find_files
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.language import language_config
from quantize.checkpoint.memory import Arena
from quantize.checkpoint.sources.find import find_stored_weights
from quantize.checkpoint.sources.stored_weight import StoredWeight
from quantize.checkpoint.tensors import BYTES, DTYPES, TensorInfo
from quantize.checkpoint.weights import Weights
from quantize.errors import QuantizeError
from quantize.nvfp4.format import NvFp4

_MAX_OPEN = 256
"""Most files that stay open. Further files are opened for each read, so that a checkpoint of many
files does not reach the system's limit of open files."""


class Checkpoint:
    """A folder of safetensors files with a ``config.json``.

    Use it as a context manager: leaving the context closes the files. Several threads may read at
    the same time.

    Args:
        folder: must hold ``config.json`` and ``*.safetensors``, with or without an index.
        decode: whether weights in a known quantized format (``quantize.checkpoint.sources``) are
            presented as floats.
        weights: where the safetensors files are; by default in ``folder``.

    Attributes:
        folder: the folder.
        weights: see above.
        config: the contents of ``config.json``.
        files: the safetensors files.
        stored: every tensor in the files, by name.
        tensors: every tensor of the model, by name. These are the tensors of ``stored``, except
            that the codes and scales of a weight in a known quantized format are replaced by one
            tensor with the weight's name and shape and dtype ``BF16``.
        nbytes_read: how many bytes of tensors have been read so far.

    Raises:
        QuantizeError: if a file or tensor is missing or malformed; the message names it.
    """

    def __init__(self, folder: Path, decode: bool = True, weights: Weights | None = None) -> None:
        self.folder = folder
        self.weights = weights or Weights()
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self._open: dict[Path, int] = {}
        self._lock = Lock()
        self.nbytes_read = 0
        self.files = find_files(folder, self.weights.names)
        self.stored: dict[str, TensorInfo] = {}
        for file in self.files:
            for info in self.weights.header(file):
                if info.name in self.stored:
                    other = self.stored[info.name].file.name
                    raise QuantizeError(f"{info.name} is in both {other} and {file.name}")
                self.stored[info.name] = info
        check_index(folder, self.stored, self.config)
        check_counts(folder / "config.json", self.config, self.stored.values())
        self._stored_weights = find_stored_weights(self.stored, self.config) if decode else {}
        self.tensors = self._decoded_view()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def close(self, name: str) -> None:
        """Close the file called ``name``, which nobody reads any more."""
        with self._lock:
            for file in [file for file in self._open if file.name == name]:
                os.close(self._open.pop(file))

    @property
    def nbytes(self) -> int:
        """Total size in bytes of all tensors, as stored."""
        return sum(t.nbytes for t in self.stored.values())

    @property
    def formats(self) -> set[str]:
        """Names of all quantized formats that occur in the files."""
        return {weight.format for weight in self._stored_weights.values()}

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the stored tensors that make up ``tensors[name]``.

        For a weight in a quantized format these are its codes and scales, else just ``name``.
        """
        weight = self._stored_weights.get(name)
        return weight.parts if weight else (name,)

    def format_of(self, name: str) -> str | None:
        """The name of a weight's quantized format, a key of ``sources.FORMATS``; None if it has
        none."""
        weight = self._stored_weights.get(name)
        return weight.format if weight else None

    def is_nvfp4(self, name: str) -> bool:
        """Whether ``tensors[name]`` is stored as NVFP4."""
        weight = self._stored_weights.get(name)
        return weight is not None and weight.nvfp4 is not None

    def has_input_scale(self, name: str) -> bool:
        """Whether ``tensors[name]`` is stored as NVFP4 with an input scale."""
        weight = self._stored_weights.get(name)
        return weight is not None and weight.input_scale is not None

    def input_scale(self, name: str, expert: int | None = None) -> torch.Tensor | None:
        """Read the input scale of a weight that is stored as NVFP4, or of one of its stacked
        experts: float32 scalar, as it multiplies E4M3 block scales. None if there is none."""
        weight = self._stored_weights.get(name)
        if weight is None or weight.input_scale is None:
            return None
        numbers = self._read(self.stored[weight.input_scale], None, None).float().flatten()
        number = numbers[0 if expert is None or len(numbers) == 1 else expert]
        return number.reciprocal() if weight.input_scale_divides else number

    def load_nvfp4(
        self, name: str, expert: int | None = None, arena: Arena | None = None
    ) -> tuple[NvFp4, torch.Tensor | None]:
        """Read a weight that is stored as NVFP4, or one of its stacked experts, as what it is.

        Returns:
            The weight, ``[out, in]`` however it is stored, and its input scale (float32 scalar,
            None if there is none), on the CPU.
        """
        weight = self._stored_weights[name]
        assert weight.nvfp4 is not None
        which = None if expert is None else (expert, None)
        return weight.nvfp4(*self._parts(name, which, arena))

    def stored_bytes(self, name: str) -> int:
        """Number of bytes that ``tensors[name]`` takes in the files."""
        return sum(self.stored[part].nbytes for part in self.parts(name))

    def files_of(self, names: Iterable[str]) -> set[str]:
        """Names of the files that hold some of ``tensors``."""
        return {self.stored[part].file.name for name in names for part in self.parts(name)}

    def text_config(self) -> dict[str, Any]:
        """The language model's config: the whole config, unless it describes other parts too."""
        return language_config(self.config)

    def load(
        self, name: str, arena: Arena | None = None, device: torch.device | None = None
    ) -> torch.Tensor:
        """Read one whole tensor: as stored, or dequantized to float32.

        Args:
            arena: supplies the memory on the CPU; without it, new memory is allocated.
            device: the device of the result, on which it is also dequantized; the CPU if None.
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
        """Read ``tensor[expert]`` of a stacked tensor, without reading the other experts.

        Args:
            experts: the number of experts, for a tensor without a dimension of experts: it holds
                them one after another along its first dimension.
            arena: as for :meth:`load`.
            device: as for :meth:`load`.
        """
        # A block scale may cover the end of one expert and the start of the next: read all.
        if experts and name in self._stored_weights:
            return self._load(name, None, arena, device).unflatten(0, (experts, -1))[expert]
        return self._load(name, (expert, experts), arena, device)

    def read_into(self, buffer: torch.Tensor, info: TensorInfo, start: int = 0) -> None:
        """Fill ``buffer`` (uint8) with data of the tensor ``info``.

        Args:
            start: the offset in bytes within the tensor's data.

        Raises:
            QuantizeError: if the file cannot be read, or ends early.
        """
        begin = info.offset + start
        if (apart := self.weights.apart(info.file, begin, begin + len(buffer))) is not None:
            buffer.copy_(torch.frombuffer(bytearray(apart), dtype=torch.uint8))
            return
        descriptor, keep = self._descriptor(info.file)
        try:
            read_fully(descriptor, buffer, info, start)
        finally:
            if not keep:
                os.close(descriptor)
        with self._lock:
            self.nbytes_read += buffer.numel()

    def will_need(self, name: str, expert: int | None = None, experts: int | None = None) -> None:
        """Ask the operating system to read a tensor, or one expert of it, into its file cache.

        The call returns at once. ``expert`` and ``experts`` are as for :meth:`load_expert`.
        """
        which = None if expert is None else (expert, experts)
        weight = self._stored_weights.get(name)
        for info in (self.stored[part] for part in self.parts(name)):
            if not self.weights.is_here(info.file):
                continue
            start, size, _ = _extent(info, _slice(weight, info, which))
            descriptor, keep = self._descriptor(info.file)
            if hasattr(os, "posix_fadvise"):
                with suppress(OSError):  # it is only advice; the read itself reports errors
                    os.posix_fadvise(descriptor, info.offset + start, size, os.POSIX_FADV_WILLNEED)
            if not keep:
                os.close(descriptor)

    def _load(
        self, name: str, expert: _Expert | None, arena: Arena | None, device: torch.device | None
    ) -> torch.Tensor:
        parts = self._parts(name, expert, arena)
        if device is not None and device.type != "cpu":
            parts = [part.to(device, non_blocking=True) for part in parts]
        weight = self._stored_weights.get(name)
        if weight is None:
            return parts[0]
        out = None
        if arena and parts[0].device.type == "cpu":  # PyTorch's allocator reuses a GPU's memory
            count = math.prod(weight.shape if expert is None else weight.shape[1:])
            out = arena.take(4 * count).view(torch.float32)
        return weight.decode(*parts, out=out)

    def _parts(self, name: str, expert: _Expert | None, arena: Arena | None) -> list[torch.Tensor]:
        weight = self._stored_weights.get(name)
        infos = [self.stored[part] for part in self.parts(name)]
        return [self._read(info, _slice(weight, info, expert), arena) for info in infos]

    def _read(self, info: TensorInfo, expert: _Expert | None, arena: Arena | None) -> torch.Tensor:
        start, size, shape = _extent(info, expert)
        buffer = arena.take(size) if arena else torch.empty(size, dtype=torch.uint8)
        self.read_into(buffer, info, start)
        return buffer.view(DTYPES[info.dtype]).view(shape)

    def _descriptor(self, file: Path) -> tuple[int, bool]:
        """A descriptor of ``file``, and whether it stays open (else the caller closes it)."""
        with self._lock:
            if file in self._open:
                return self._open[file], True
        descriptor = self.weights.open(file)  # which may have to wait for it
        with self._lock:
            if len(self._open) < _MAX_OPEN and file not in self._open:
                self._open[file] = descriptor
                return descriptor, True
            return descriptor, False

    def _decoded_view(self) -> dict[str, TensorInfo]:
        """``stored``, with the parts of each decoded weight replaced by one tensor."""
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


def read_fully(descriptor: int, buffer: torch.Tensor, info: TensorInfo, start: int = 0) -> None:
    """Fill ``buffer`` (uint8) from an open file; see ``Checkpoint.read_into``."""
    view = memoryview(buffer.numpy().data)
    done = 0
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


_Expert = tuple[int, int | None]
"""An expert's number, and the number of experts if the tensor holds them one after another along
its first dimension (None if it has a dimension of experts)."""


def _slice(weight: StoredWeight | None, info: TensorInfo, expert: _Expert | None) -> _Expert | None:
    """Which slice of the part ``info`` belongs to ``expert`` of ``weight``; None: all of it."""
    if weight is None or expert is None:
        return expert
    if info.name in weight.shared:
        return None
    flat = info.shape[:1] != weight.shape[:1]
    return expert[0], weight.shape[0] if flat else expert[1]


def _extent(info: TensorInfo, expert: _Expert | None) -> tuple[int, int, tuple[int, ...]]:
    """Offset in bytes, size in bytes and shape of one expert within a tensor's data.

    Without an expert, they are those of the whole tensor.
    """
    if expert is None:
        return 0, info.nbytes, info.shape
    number, count = expert
    shape = (info.shape[0] // count, *info.shape[1:]) if count else info.shape[1:]
    size = math.prod(shape) * BYTES[info.dtype]
    return number * size, size, shape
