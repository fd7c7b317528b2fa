"""The files of a checkpoint and the headers of its safetensors files. No tensor data is read.

A checkpoint may come from anywhere, so this module trusts nothing in it: files and headers that
contradict each other are an error.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from quantize.checkpoint.json_files import INDEX, read_json
from quantize.checkpoint.language import language_config
from quantize.checkpoint.tensors import BYTES, TensorInfo
from quantize.errors import QuantizeError

_MAX_HEADER = 100_000_000
"""Most bytes of a header, as the safetensors library has it."""

_NUMBERED = re.compile(r"(?P<stem>.*)-\d+-of-(?P<count>\d{1,9})\.safetensors")
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|output|embed_out|output_layer)\.weight")
"""Names of output heads (``quantize.layouts.heads`` has the models)."""

_ABSURD_NUMBER = re.compile(r"\d{19}")
"""A number in a tensor's name that is too long to mean anything. Python refuses to convert strings
of some thousand digits to integers."""


def find_files(
    folder: Path, there: Collection[str] | None = None, name_of_model: str = ""
) -> list[Path]:
    """The safetensors files of a checkpoint.

    These are the files that its index names. Without an index they are ``model.safetensors``, or
    else all ``*.safetensors`` files of the folder, if these can be one set.

    Args:
        there: names of the files that count as there, of a model on the hub; by default those in
            ``folder``. Its index is read in ``folder``.
        name_of_model: what a message calls a model on the hub, whose folder here lacks files that
            nobody has asked for yet.

    Raises:
        QuantizeError: if there are no files, if one is missing, if there are several sets and no
            index, or if the index names something that is not a plain file name.
    """
    index = folder / INDEX
    if not os.path.lexists(index):  # a broken link is an error, not a checkpoint without one
        if there is None:
            files = sorted(folder.glob("*.safetensors"))
        else:
            files = [folder / name for name in sorted(there) if name.endswith(".safetensors")]
        single = folder / "model.safetensors"
        if single in files:  # the other files (an adapter, a consolidated copy) are not the model
            return [single]
        if not files:
            raise QuantizeError(
                f"{name_of_model or folder} holds no *.safetensors files; convert the weights to "
                "safetensors first (pickle files are never opened)"
            )
        _check_one_set(files)
        return files
    names = set(_weight_map(index).values())
    for name in sorted(names):
        # An index may come from anywhere: it must not name files outside of its folder.
        if Path(name).name != name or name in ("", ".."):
            raise QuantizeError(f"{index}: shard name {name!r} is not a plain file name")
        if name not in there if there is not None else not (folder / name).exists():
            if name_of_model:
                raise QuantizeError(
                    f"{name_of_model} has an index that names {name}, which the hub has not; pass "
                    "another --revision, or tell who published it"
                )
            raise QuantizeError(f"{index} names {name}, which is missing; download it again")
    return [folder / name for name in sorted(names)]


def read_metadata(file: Path) -> dict[str, str] | None:
    """The ``__metadata__`` of a safetensors file; None if it has none. Raises what
    :func:`read_header` does."""
    found: dict[str, str] | None = _read(file)[0].get("__metadata__")
    return found


def read_header(file: Path) -> list[TensorInfo]:
    """All tensors of a safetensors file, in the order of their data.

    Only the header is read. The safetensors library is not asked, because it maps the whole file,
    which fails if the file is larger than memory; the checks here are the library's
    (https://huggingface.co/docs/safetensors, ``Metadata::validate``).

    Raises:
        QuantizeError: if the file is incomplete, or if a tensor has an unsupported dtype or a name
            with an invalid number.
    """
    return _whole(file, *_read(file)[1:])


def header_of(file: Path, beginning: bytes, size: int) -> list[TensorInfo]:
    """:func:`read_header` of a file whose first bytes, all of the header among them, are known.

    Args:
        file: what messages and tensors call it.
        size: of the whole file in bytes.
    """
    return _whole(file, *_parsed(file, beginning, size)[1:])


def header_length(file: Path, first: bytes, size: int) -> int:
    """How many bytes of a file its header takes, going by the first 8.

    Raises:
        QuantizeError: if the file, or the format, allows no such header.
    """
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > min(_MAX_HEADER, size - 8):
        raise _incomplete(file, f"its header would have {length} bytes")
    return 8 + length


def _whole(file: Path, tensors: list[TensorInfo], begin: int, size: int) -> list[TensorInfo]:
    end = tensors[-1].offset + tensors[-1].nbytes if tensors else begin
    if end != size:
        raise QuantizeError(
            f"{file}: not a complete safetensors file ({size} bytes, and its header speaks of "
            f"{end}); download it again"
        )
    return tensors


def _read(file: Path) -> tuple[dict[str, Any], list[TensorInfo], int, int]:
    """A file's header, its tensors, where its data begin, and its size."""
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            size = os.fstat(stream.fileno()).st_size
            beginning = first + stream.read(header_length(file, first, size) - 8)
    except OSError as error:
        raise _incomplete(file, error) from error
    return _parsed(file, beginning, size)


def _parsed(
    file: Path, beginning: bytes, size: int
) -> tuple[dict[str, Any], list[TensorInfo], int, int]:
    length = header_length(file, beginning, size)
    try:
        raw = beginning[8:length]
        if not raw.startswith(b"{"):
            raise ValueError("its header is no JSON object")
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repetition)
        return header, _tensors(file, header, length), length, size
    except (ValueError, RecursionError) as error:
        raise _incomplete(file, error) from error


def _incomplete(file: Path, why: object) -> QuantizeError:
    return QuantizeError(f"{file}: not a complete safetensors file ({why}); download it again")


def _tensors(file: Path, header: Any, start: int) -> list[TensorInfo]:
    """The entries of a header whose data begin at ``start``, in the order of their data.

    Raises:
        ValueError: if they contradict each other, or the format.
    """
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise ValueError("__metadata__ is no object of strings")
            continue
        if _ABSURD_NUMBER.search(name) or _has_foreign_digits(name):
            raise QuantizeError(f"{file}: {name[:100]!r} has a number that means nothing")
        if not isinstance(entry, dict):
            raise ValueError(f"{name[:100]!r} has no entry")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets)):
            raise ValueError(f"{name[:100]!r} has no dtype, shape or place")
        if dtype not in BYTES:
            raise QuantizeError(f"{file}: {name} has dtype {dtype}, which is not supported")
        begin, end = offsets if len(offsets) == 2 else (0, -1)
        info = TensorInfo(name, dtype, tuple(shape), file, start + begin)
        if end - begin != info.nbytes:
            raise ValueError(f"{name[:100]!r} has another size than its shape and dtype")
        tensors.append(info)
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    for info in tensors:
        if info.offset != start:
            raise ValueError(f"the data of {info.name[:100]!r} do not follow on others")
        start += info.nbytes
    return tensors


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of sizes: integers that fit into 64 bits, none negative."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**64 for n in value)


def check_index(folder: Path, stored: Mapping[str, TensorInfo], config: dict[str, Any]) -> None:
    """Raise QuantizeError if the index names a tensor that its file does not hold.

    A checkpoint without an index passes. The head of a model that says that it is tied
    (``tie_word_embeddings``) need not be there.
    """
    index = folder / INDEX
    if not os.path.lexists(index):
        return
    tied = language_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
    for name, file in _weight_map(index).items():
        info = stored.get(name)
        if info is None and tied is True and _HEAD.fullmatch(name):
            continue  # some tools list the head, though its weights are the embedding's
        if info is None or info.file.name != file:
            raise QuantizeError(f"{index} says that {name} is in {file}, but it is not there")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise QuantizeError(f"{index} has no 'weight_map' of tensor names to file names")
    return weight_map


def _check_one_set(files: list[Path]) -> None:
    """Raise QuantizeError if ``files``, which no index names, cannot be one set of shards.

    Only ``-00001-of-00007`` in their names says which belong together, and how many there are.
    """
    sets: dict[tuple[str, str], list[str]] = defaultdict(list)
    others = []
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            sets[match["stem"], match["count"]].append(file.name)
        else:
            others.append(file.name)
    folder = files[0].parent
    if len(sets) + bool(sets and others) > 1:
        found = ", ".join(
            [*(f"{stem}-*-of-{count}.safetensors" for stem, count in sets), *others[:3]]
        )
        raise QuantizeError(
            f"{folder}: no {INDEX} says which of these are the model: {found}; download the index "
            "too, or move what is not the model to another folder"
        )
    for (stem, count), names in sets.items():
        if len(names) < int(count):
            raise QuantizeError(
                f"{folder}: of the {int(count)} files {stem}-*-of-*.safetensors only {len(names)} "
                "are there; download it again"
            )


def _has_foreign_digits(name: str) -> bool:
    """Whether ``name`` has digits outside of ASCII, such as ².

    Some of Python's functions take them for numbers and others do not.
    """
    return not name.isascii() and any(c.isdigit() and not c.isascii() for c in name)
