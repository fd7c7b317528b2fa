"""A checkpoint on disk: its config, and where each tensor lies. Nothing is loaded until asked."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from quantize.errors import QuantizeError

INDEX = "model.safetensors.index.json"

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes an element, by safetensors' names of dtypes."""


class TensorInfo(NamedTuple):
    """What a safetensors header says of one tensor."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


class Checkpoint:
    """A folder of safetensors files with a ``config.json``.

    Use as a context manager: files stay open (memory-mapped) until it ends.

    Args:
        folder: must hold ``config.json`` and ``*.safetensors``, with or without an index.

    Raises:
        QuantizeError: naming the file or tensor that is missing or malformed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self.files = self._find_files()
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if name in self.tensors:
                    other = self.tensors[name].file.name
                    raise QuantizeError(f"{name} is in both {other} and {file.name}")
                view = handle.get_slice(name)
                dtype = view.get_dtype()
                if dtype not in BYTES:
                    raise QuantizeError(f"{file}: {name} has dtype {dtype}, which is not supported")
                self.tensors[name] = TensorInfo(name, file, dtype, tuple(view.get_shape()))
        self._check_index()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: nested in a multimodal one."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    def load(self, name: str) -> torch.Tensor:
        """One whole tensor, as stored."""
        return self._read(name, lambda handle: handle.get_tensor(name))

    def load_expert(self, name: str, expert: int) -> torch.Tensor:
        """``tensor[expert]`` of a stacked tensor, without reading the rest of it."""
        return self._read(name, lambda handle: handle.get_slice(name)[expert])

    def _read(self, name: str, read: Any) -> torch.Tensor:
        file = self.tensors[name].file
        try:
            return read(self._handle(file))
        except (SafetensorError, OSError) as error:
            raise QuantizeError(f"{file}: cannot read {name}: {error}") from error

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise QuantizeError(
                    f"{file}: not a complete safetensors file ({error}); download it again"
                ) from error
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file]

    def _find_files(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.exists():
            files = sorted(self.folder.glob("*.safetensors"))
            if not files:
                raise QuantizeError(
                    f"{self.folder} holds no *.safetensors files; convert the weights to "
                    "safetensors first (pickle files are never opened)"
                )
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
        if not index.exists():
            return
        for name, file in self._weight_map(index).items():
            info = self.tensors.get(name)
            if info is None or info.file.name != file:
                raise QuantizeError(f"{index} says that {name} is in {file}, but it is not there")

    @staticmethod
    def _weight_map(index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) for v in weight_map.values()
        ):
            raise QuantizeError(f"{index} has no 'weight_map' of tensor names to file names")
        return weight_map


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``.

    Raises:
        QuantizeError: if the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QuantizeError(f"{file} does not exist") from None
    except (OSError, ValueError) as error:
        raise QuantizeError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise QuantizeError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


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
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
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
