"""A checkpoint on disk: its config, and where each tensor lies. Nothing is loaded until asked.

Files are read with ``pread``, not mapped into memory: a file that is cut off, or a disk that fails,
is then an error message instead of the signal that kills a process, and memory holds what was
asked for and no more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from quantize import sources
from quantize.errors import QuantizeError
from quantize.memory import Arena

INDEX = "model.safetensors.index.json"

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes an element, by safetensors' names of dtypes."""


DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip
"""PyTorch's dtypes, by safetensors' names of them."""

_NUMBERED = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d{1,9})\.safetensors")
_ABSURD_NUMBER = re.compile(r"\d{19}")
"""In a tensor's name. Python itself refuses to read numbers of some thousand digits."""

_COUNT = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?)$")
_MAX_COUNT = 1000
"""Layers that a config may have in any case; more need as many tensors. All of them are built, if
only without memory, to find the gate."""

_MAX_DEPTH = 100
"""Levels of nesting in a JSON file; Python's own functions fail at some hundreds."""

_SAMPLES, _SAMPLE = 16, 256
"""Tensors a file of which the middle is looked at to tell checkpoints apart, and bytes of each."""

_DOWNLOADED = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"),
    *("LICENSE*", "NOTICE*", "*.md"),
]
"""What is fetched from the hub. Python files are copied, and run only with the user's trust."""

_MAX_OPEN = 256
"""Files kept open; those beyond are opened for each read, so that no limit is ever met."""


class TensorInfo(NamedTuple):
    """What a safetensors header says of one tensor.

    Attributes:
        offset: bytes before its data in ``file``.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


class Checkpoint:
    """A folder of safetensors files with a ``config.json``.

    Use as a context manager: files stay open until it ends. Reading is safe from several threads.

    Args:
        folder: must hold ``config.json`` and ``*.safetensors``, with or without an index.
        decode: whether weights in a known quantized format appear as floats.

    Attributes:
        stored: every tensor in the files.
        tensors: every tensor of the model: those of ``stored``, but with each weight that a known
            format splits into codes and scales (``quantize.sources``) as one tensor, ``BF16``.

    Raises:
        QuantizeError: naming the file or tensor that is missing or malformed.
    """

    def __init__(self, folder: Path, decode: bool = True) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self._open: dict[Path, int] = {}
        self._lock = Lock()
        self.files = self._find_files()
        self.stored: dict[str, TensorInfo] = {}
        for file in self.files:
            for info in _read_header(file):
                if info.name in self.stored:
                    other = self.stored[info.name].file.name
                    raise QuantizeError(f"{info.name} is in both {other} and {file.name}")
                self.stored[info.name] = info
        self._check_index()
        self._check_counts()
        self._encoded = sources.find_encoded(self.stored, self.config) if decode else {}
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
        """Names of the quantized formats (``quantize.sources``) that some tensors are stored in."""
        decoded = {encoded.format for encoded in self._encoded.values()}
        return decoded | sources.undecodable(self.stored)

    def parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors that ``tensors[name]`` consists of: mostly just itself."""
        encoded = self._encoded.get(name)
        return encoded.parts if encoded else (name,)

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
        if experts and name in self._encoded:  # block scales need not end where experts do
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
        encoded = self._encoded.get(name)
        if encoded is None:
            return parts[0]
        out = None
        if arena and parts[0].device.type == "cpu":  # a GPU's allocator reuses memory by itself
            count = math.prod(encoded.shape if expert is None else encoded.shape[1:])
            out = arena.take(4 * count).view(torch.float32)
        return encoded.decode(*parts, out=out)

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
        owner = {part: name for name, enc in self._encoded.items() for part in enc.parts}
        for name, info in self.stored.items():
            logical = owner.get(name)
            if logical is None:
                view[name] = info
            elif logical not in view:
                shape = self._encoded[logical].shape
                view[logical] = TensorInfo(logical, info.file, "BF16", shape)
        return view

    def _find_files(self) -> list[Path]:
        index = self.folder / INDEX
        if not os.path.lexists(index):  # a broken link is an error, not a checkpoint without one
            files = sorted(self.folder.glob("*.safetensors"))
            single = self.folder / "model.safetensors"
            if single in files:  # what lies beside it (an adapter, a consolidated copy) is not it
                return [single]
            if not files:
                raise QuantizeError(
                    f"{self.folder} holds no *.safetensors files; convert the weights to "
                    "safetensors first (pickle files are never opened)"
                )
            _check_numbers(files)
            return files
        names = set(self._weight_map(index).values())
        for name in sorted(names):
            # An index is data from somewhere else: it must not point out of its folder.
            if Path(name).name != name or name in ("", ".."):
                raise QuantizeError(f"{index}: shard name {name!r} is not a plain file name")
            if not (self.folder / name).exists():
                raise QuantizeError(f"{index} names {name}, which is missing; download it again")
        return [self.folder / name for name in sorted(names)]

    def _check_index(self) -> None:
        index = self.folder / INDEX
        if not os.path.lexists(index):
            return
        for name, file in self._weight_map(index).items():
            info = self.stored.get(name)
            if info is None or info.file.name != file:
                raise QuantizeError(f"{index} says that {name} is in {file}, but it is not there")

    def _check_counts(self) -> None:
        parts = [self.config, *(v for v in self.config.values() if isinstance(v, dict))]
        for key, count in (item for part in parts for item in part.items()):
            limit = max(_MAX_COUNT, len(self.stored))
            if isinstance(count, int) and count > limit and _COUNT.search(key):
                raise QuantizeError(
                    f"{self.folder / 'config.json'}: {key} is {count}, but there are only "
                    f"{len(self.stored)} tensors"
                )

    @staticmethod
    def _weight_map(index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) for v in weight_map.values()
        ):
            raise QuantizeError(f"{index} has no 'weight_map' of tensor names to file names")
        return weight_map


def _check_numbers(files: list[Path]) -> None:
    """Without an index, only ``-of-00007`` in the names says how many files there should be."""
    found = Counter(
        (match["stem"], int(match["count"]))
        for file in files
        if (match := _NUMBERED.fullmatch(file.name))
    )
    for (stem, count), there in found.items():
        if there < count:
            raise QuantizeError(
                f"{files[0].parent}: of the {count} files {stem}-*-of-*.safetensors only {there} "
                "are there; download it again"
            )


def _read_header(file: Path) -> list[TensorInfo]:
    """All tensors of a safetensors file, in the order of their data."""
    try:
        with safe_open(file, framework="pt"):
            pass  # the library's checks: sizes, offsets, dtypes, the header's own length
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        tensors = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if _ABSURD_NUMBER.search(name) or _has_foreign_digits(name):
                raise QuantizeError(f"{file}: {name[:100]!r} has a number that means nothing")
            if entry["dtype"] not in BYTES:
                raise QuantizeError(
                    f"{file}: {name} has dtype {entry['dtype']}, which is not supported"
                )
            offset = 8 + length + entry["data_offsets"][0]
            tensors.append(TensorInfo(name, file, entry["dtype"], tuple(entry["shape"]), offset))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise QuantizeError(
            f"{file}: not a complete safetensors file ({error}); download it again"
        ) from error
    return sorted(tensors, key=lambda tensor: tensor.offset)


_Expert = tuple[int, int | None]
"""An expert's number, and how many lie one after another without a dimension of their own."""


def _has_foreign_digits(name: str) -> bool:
    """Digits such as ² are numbers to some of Python's functions, and none to others."""
    return not name.isascii() and any(c.isdigit() and not c.isascii() for c in name)


def _extent(info: TensorInfo, expert: _Expert | None) -> tuple[int, int, tuple[int, ...]]:
    """Where in a tensor's data an expert's begins, its size, both in bytes, and its shape."""
    if expert is None:
        return 0, info.nbytes, info.shape
    number, count = expert
    shape = (info.shape[0] // count, *info.shape[1:]) if count else info.shape[1:]
    size = math.prod(shape) * BYTES[info.dtype]
    return number * size, size, shape


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``.

    Raises:
        QuantizeError: if the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuantizeError(f"{file} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise QuantizeError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise QuantizeError(f"{file}: expected a JSON object, found {type(value).__name__}")
    if _nests_deeper(value, _MAX_DEPTH):
        raise QuantizeError(f"{file}: nested more than {_MAX_DEPTH} levels deep")
    return value


def _nests_deeper(value: Any, depth: int) -> bool:
    level = [value]
    while level and depth:
        depth -= 1
        nested = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in nested for v in values if isinstance(v, dict | list)]
    return bool(level)


def resolve(source: str) -> Path:
    """The folder of ``source``: a folder as it is, a hub id downloaded (or found in the cache)."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise QuantizeError(f"{source} is neither a folder nor a hub id such as org/name")
    try:
        return Path(
            snapshot_download(
                source,
                allow_patterns=_DOWNLOADED,
                ignore_patterns=["*/*"],  # only the top level is read
            )
        )
    except (
        Exception
    ) as error:  # the hub's own, OSErrors, and those of whichever HTTP library it uses
        raise QuantizeError(
            f"{source} is not a folder here, and downloading it from the hub failed: "
            + " ".join(str(error).split())
        ) from error
