"""The files of a checkpoint and the headers of its safetensors files. No tensor data is read.

A checkpoint may come from anywhere, so this module trusts nothing in it: files and headers that
contradict each other are an error.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.tensors import BYTES, TensorInfo
from quantize.errors import QuantizeError

INDEX = "model.safetensors.index.json"

_NUMBERED = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d{1,9})\.safetensors")
_ABSURD_NUMBER = re.compile(r"\d{19}")
"""A number in a tensor's name that is too long to mean anything. Python refuses to convert strings
of some thousand digits to integers."""


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    These are the files that its index names. Without an index they are ``model.safetensors``, or
    else all ``*.safetensors`` files of the folder.

    Raises:
        QuantizeError: if there are no files, if one is missing, or if the index names something
            that is not a plain file name.
    """
    index = folder / INDEX
    if not os.path.lexists(index):  # a broken link is an error, not a checkpoint without one
        files = sorted(folder.glob("*.safetensors"))
        single = folder / "model.safetensors"
        if single in files:  # the other files (an adapter, a consolidated copy) are not the model
            return [single]
        if not files:
            raise QuantizeError(
                f"{folder} holds no *.safetensors files; convert the weights to "
                "safetensors first (pickle files are never opened)"
            )
        _check_numbers(files)
        return files
    names = set(_weight_map(index).values())
    for name in sorted(names):
        # An index may come from anywhere: it must not name files outside of its folder.
        if Path(name).name != name or name in ("", ".."):
            raise QuantizeError(f"{index}: shard name {name!r} is not a plain file name")
        if not (folder / name).exists():
            raise QuantizeError(f"{index} names {name}, which is missing; download it again")
    return [folder / name for name in sorted(names)]


def read_header(file: Path) -> list[TensorInfo]:
    """All tensors of a safetensors file, in the order of their data.

    Raises:
        QuantizeError: if the file is incomplete, or if a tensor has an unsupported dtype or a name
            with an invalid number.
    """
    try:
        with safe_open(file, framework="pt"):
            pass  # opening runs the library's checks: sizes, offsets, dtypes, header length
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
            tensors.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, offset))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise QuantizeError(
            f"{file}: not a complete safetensors file ({error}); download it again"
        ) from error
    return sorted(tensors, key=lambda tensor: tensor.offset)


def check_index(folder: Path, stored: Mapping[str, TensorInfo]) -> None:
    """Raise QuantizeError if the index names a tensor that its file does not hold.

    A checkpoint without an index passes.
    """
    index = folder / INDEX
    if not os.path.lexists(index):
        return
    for name, file in _weight_map(index).items():
        info = stored.get(name)
        if info is None or info.file.name != file:
            raise QuantizeError(f"{index} says that {name} is in {file}, but it is not there")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise QuantizeError(f"{index} has no 'weight_map' of tensor names to file names")
    return weight_map


def _check_numbers(files: list[Path]) -> None:
    """Raise QuantizeError if shards are missing from a checkpoint without an index.

    Only the ``-of-00007`` in their names says how many there should be.
    """
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


def _has_foreign_digits(name: str) -> bool:
    """Whether ``name`` has digits outside of ASCII, such as ².

    Some of Python's functions take them for numbers and others do not.
    """
    return not name.isascii() and any(c.isdigit() and not c.isascii() for c in name)
