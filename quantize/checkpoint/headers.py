"""Which files a checkpoint consists of, and what their headers say: nothing else is read.

Everything here is data from somewhere else, so what does not fit together is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.tensors import BYTES, TensorInfo
from quantize.errors import QuantizeError

INDEX = "model.safetensors.index.json"

_NUMBERED = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d{1,9})\.safetensors")
_ABSURD_NUMBER = re.compile(r"\d{19}")
"""In a tensor's name. Python itself refuses to read numbers of some thousand digits."""

_COUNT = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?)$")
_MAX_COUNT = 1000
"""Layers that a config may have in any case; more need as many tensors. All of them are built, if
only without memory, to find the gate."""


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, else those that lie there.

    Raises:
        QuantizeError: if there are none, one is missing, or the index names something else.
    """
    index = folder / INDEX
    if not os.path.lexists(index):  # a broken link is an error, not a checkpoint without one
        files = sorted(folder.glob("*.safetensors"))
        single = folder / "model.safetensors"
        if single in files:  # what lies beside it (an adapter, a consolidated copy) is not it
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
        # An index is data from somewhere else: it must not point out of its folder.
        if Path(name).name != name or name in ("", ".."):
            raise QuantizeError(f"{index}: shard name {name!r} is not a plain file name")
        if not (folder / name).exists():
            raise QuantizeError(f"{index} names {name}, which is missing; download it again")
    return [folder / name for name in sorted(names)]


def read_header(file: Path) -> list[TensorInfo]:
    """All tensors of a safetensors file, in the order of their data.

    Raises:
        QuantizeError: if the file is not whole, or a tensor has a dtype or name that means nothing.
    """
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
            tensors.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, offset))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise QuantizeError(
            f"{file}: not a complete safetensors file ({error}); download it again"
        ) from error
    return sorted(tensors, key=lambda tensor: tensor.offset)


def check_index(folder: Path, stored: Mapping[str, TensorInfo]) -> None:
    """Raise QuantizeError if the index, where there is one, names a tensor that is not there."""
    index = folder / INDEX
    if not os.path.lexists(index):
        return
    for name, file in _weight_map(index).items():
        info = stored.get(name)
        if info is None or info.file.name != file:
            raise QuantizeError(f"{index} says that {name} is in {file}, but it is not there")


def check_counts(file: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise QuantizeError if ``config``, read from ``file``, has more layers than can be."""
    parts = [config, *(v for v in config.values() if isinstance(v, dict))]
    for key, count in (item for part in parts for item in part.items()):
        limit = max(_MAX_COUNT, tensors)
        if isinstance(count, int) and count > limit and _COUNT.search(key):
            raise QuantizeError(f"{file}: {key} is {count}, but there are only {tensors} tensors")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
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


def _has_foreign_digits(name: str) -> bool:
    """Digits such as ² are numbers to some of Python's functions, and none to others."""
    return not name.isascii() and any(c.isdigit() and not c.isascii() for c in name)
